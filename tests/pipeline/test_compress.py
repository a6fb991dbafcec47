"""`compress` from a checkpoint to an artefact: what is written, that it repeats, and how much is lost."""

import json

import pytest
import torch
from transformers import MambaForCausalLM

from ssmc.compressor import compress, read_recipe
from ssmc.runtime.errors import CalibrationError, CheckpointError, OutputError, UsageError
from ssmc.runtime.files import sha256
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

QUICK = {"nsamples": 4, "seqlen": 256}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny", out=out, **QUICK)
    return out


def test_the_masked_model_loads_anywhere_and_its_pruned_rows_are_zero(artefact):
    model, info = MambaForCausalLM.from_pretrained(artefact, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    manifest = json.loads((artefact / "ssmc.json").read_text())
    for block, layer in zip(model.backbone.layers, manifest["layers"], strict=True):
        weight, r, n = block.mixer.x_proj.weight, block.mixer.time_step_rank, block.mixer.ssm_state_size
        alive = [k for k in range(n) if weight[r + k].any() or weight[r + n + k].any()]
        assert alive == layer["kept"]
        assert len(alive) == 8
    assert load_checkpoint(artefact).dtypes == load_checkpoint("tiny").dtypes  # float16 stays float16


def test_the_manifest_tells_how_it_came_about(artefact):
    manifest = json.loads((artefact / "ssmc.json").read_text())
    assert manifest["kind"] == "masked"
    assert manifest["config"]["score"] is None  # the pattern's default
    assert manifest["config"]["seed"] == 0
    assert manifest["calibration"]["nsamples"] == 4
    assert len(manifest["calibration"]["sha256"]) == 64
    assert manifest["dimensions"]["d_state"] == 16
    assert all(0 < layer["error"] < layer["error_unrepaired"] for layer in manifest["layers"])
    for name, entry in manifest["files"].items():
        path = artefact / name
        assert (entry["bytes"], entry["sha256"]) == (path.stat().st_size, sha256(path))


def test_the_same_run_and_its_recipe_give_the_same_bytes(artefact, tmp_path):
    compress("tiny", out=tmp_path / "again", **QUICK)
    compress(**read_recipe(artefact / "recipe.yaml"), out=tmp_path / "recipe")
    assert contents(artefact) == contents(tmp_path / "again") == contents(tmp_path / "recipe")
    compress("tiny", out=tmp_path / "seed", **QUICK, seed=1)
    assert contents(tmp_path / "seed")["model.safetensors"] != contents(artefact)["model.safetensors"]


def test_default_loses_a_fraction_of_what_the_vote_without_repair_loses(artefact, tmp_path):
    """On held-out text, with little calibration text: benchmarks/loss/scores.py finds a tenth, here a quarter."""
    dense = load_checkpoint("tiny", dtype=torch.float32)
    text = tokenize(read_texts(heldout_path()), load_tokenizer(dense))[: 8 * 512]
    compress("tiny", out=tmp_path / "vote", score="sparsessm-vote", repair=False, **QUICK)
    loss = {}
    for name in ("tiny", artefact, tmp_path / "vote"):
        model = use_fast_scan(load_checkpoint(name, dtype=torch.float32).model)
        loss[name] = perplexity(model, text, window=512).nll_per_token
    excess = {name: loss[name] - loss["tiny"] for name in loss}
    assert excess[tmp_path / "vote"] > 0.02
    assert excess[artefact] < excess[tmp_path / "vote"] / 4


@pytest.mark.parametrize(
    ("options", "check"),
    [
        ({"pattern": "unstructured"}, lambda t: int((t["backbone.layers.0.mixer.A_log"] == 0).sum()) == 512 * 16 // 2),
        (
            {"pattern": "2:4", "target": "ssm"},
            lambda t: ((t["backbone.layers.3.mixer.A_log"].view(512, 4, 4) == 0).sum(2) == 2).all(),
        ),
        (
            {"pattern": "2:4", "ffn_score": "wanda"},
            lambda t: ((t["backbone.layers.1.mixer.in_proj.weight"].view(1024, 64, 4) == 0).sum(2) == 2).all(),
        ),
        (
            {"pattern": "layer", "sparsity": 0.2},
            lambda t: sum(not t[f"backbone.layers.{i}.mixer.out_proj.weight"].any() for i in range(6)) == 1,
        ),
    ],
)
def test_other_patterns_from_end_to_end(tmp_path, options, check):
    compress("tiny", out=tmp_path / "out", nsamples=2, seqlen=128, **options)
    assert check(load_checkpoint(tmp_path / "out").tensors())


def test_both_formats_of_one_model_give_the_same_weights(model_directory, tmp_path):
    made = []
    for layout in ("transformers", "mamba-ssm"):
        source = model_directory(layout)
        compress(source, out=tmp_path / layout, score="magnitude", repair=False)
        made.append(load_checkpoint(tmp_path / layout).tensors())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_run_that_reads_no_text_needs_no_tokenizer(model_directory, tmp_path):
    source = model_directory("mamba-ssm")
    assert compress(source, out=tmp_path / "out", score="magnitude", repair=False).manifest["calibration"] is None
    with pytest.raises(CheckpointError, match=r"without a tokenizer.*--tokenizer"):
        compress(source, out=tmp_path / "other")


def test_notes_say_what_a_choice_is_worth(tmp_path):
    twelve = compress("tiny", out=tmp_path / "a", sparsity=0.25, score="magnitude", repair=False)
    assert any("12 states is not a power of two" in note and "gains nothing" in note for note in twelve.notes)
    rounded = compress(
        "tiny", out=tmp_path / "b", sparsity=0.25, round_to="power-of-two", score="magnitude", repair=False
    )
    assert rounded.notes == ()
    assert len(rounded.layers[0].states_kept) == 8
    entries = compress("tiny", out=tmp_path / "c", pattern="unstructured", score="magnitude")
    assert any("makes nothing smaller" in note for note in entries.notes)


def test_little_text_is_a_note_and_none_is_an_error(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small fox who lived in a wood. " * 40)
    few = compress("tiny", out=tmp_path / "few", calib=text, nsamples=64, seqlen=128)
    assert any("64 were asked for" in note for note in few.notes)
    assert few.manifest["calibration"]["nsamples"] < 64
    assert not any("by heart" in note for note in few.notes)  # nothing is fitted to the text
    fitted = compress("tiny", out=tmp_path / "fitted", pattern="channel", nsamples=1, seqlen=128)
    assert any("fitted on 128 tokens of text, few for 256 channels" in note for note in fitted.notes)
    with pytest.raises(CalibrationError, match="one calibration sample needs 4096"):
        compress("tiny", out=tmp_path / "none", calib=text, seqlen=4096)
    assert not (tmp_path / "none").exists()


def test_nothing_is_overwritten_unasked_and_nothing_foreign_ever(tmp_path):
    quick = {"score": "magnitude", "repair": False}
    out = tmp_path / "out"
    compress("tiny", out=out, **quick)
    before = contents(out)
    with pytest.raises(OutputError, match="--force"):
        compress("tiny", out=out, sparsity=0.75, **quick)
    assert contents(out) == before
    compress("tiny", out=out, sparsity=0.75, force=True, **quick)
    assert contents(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="never replaced"):
        compress("tiny", out=tmp_path / "mine", force=True, **quick)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sparsity: 2\nmodel: tiny\n", "sparsity 2"),
        ("sparsty: 0.5\nmodel: tiny\n", "no option 'sparsty'"),
        ("- a\n- b\n", "does not name options"),
        ("a: [1,\n", "not YAML"),
        ("model: !!python/object/apply:os.system ['touch boom']\n", "not YAML"),
    ],
)
def test_a_wrong_recipe_is_one_clear_sentence(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UsageError, match=words):
        compress(**read_recipe(tmp_path / "recipe.yaml"), out=tmp_path / "out")
    assert not (tmp_path / "boom").exists()
