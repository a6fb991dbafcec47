"""`--for RUNTIME`: numbers that a runtime takes, the format it reads, and refusals of what it does not run."""

import json

import pytest

from ssmc.compressor import compress
from ssmc.exporters import export, runs_where
from ssmc.exporters.foresight import refuse_unfit
from ssmc.exporters.onnx.layers import LAYERS, PORTABLE
from ssmc.exporters.registry import all_formats
from ssmc.runtime.errors import UsageError
from ssmc.runtime.manifest import read_manifest
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.consumers import CONSUMERS, computes_otherwise, misfit, refuses
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.llama_cpp import LlamaCpp, is_installed
from tests.support import vocabularies
from tests.support.commandline import run
from tests.support.families import FAMILIES
from tests.support.models import random_mamba2, random_model

QUICK = {"score": "random", "repair": False}


def sizes(make=random_model, **changes):
    config = make(**changes).config
    return architecture_for(config.model_type).dimensions(config)


def test_every_runtime_reads_a_format_there_is():
    for consumer in CONSUMERS.values():
        all_formats()[consumer.format].settings(consumer.options)


@pytest.mark.parametrize(
    ("runtime", "asked", "kept"),
    [("mlx-lm", 0.4, 32), ("llama.cpp", 0.4, 32), ("vllm", 0.3, 32), ("transformers", 0.3, 45), ("genai", 0.3, 45)],
)
def test_states_are_rounded_to_what_a_runtime_gains_from(tmp_path, runtime, asked, kept):
    """Of 64 states of the embedded Mamba-2."""
    result = compress("tiny-mamba2", out=tmp_path / "out", sparsity=asked, runtime=runtime, **QUICK)
    assert {len(layer["kept"]) for layer in result.manifest["layers"]} == {kept}
    assert result.manifest["config"]["runtime"] == runtime


@pytest.mark.parametrize(("model", "sparsity"), [("tiny", 0.875), ("tiny", 0.75), ("tiny-mamba2", 0.5)])
def test_what_is_pruned_for_llama_cpp_is_what_the_figures_of_its_speed_are_of(tmp_path, model, sparsity):
    """docs/results.md: those are of models that were pruned for nobody."""
    for name, runtime in (("anybody", None), ("llama", "llama.cpp")):
        compress(model, out=tmp_path / name, sparsity=sparsity, runtime=runtime, **QUICK)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("anybody", "llama"))
    assert one == other


@pytest.mark.skipif(not is_installed(), reason="llama.cpp (xllamacpp) is not installed")
def test_heads_by_any_number_for_llama_cpp_and_for_nobody_else(tmp_path):
    model = random_mamba2(vocab_size=392, eos_token_id=0, n_groups=1)
    source, out = vocabularies.save(model, tmp_path / "model"), tmp_path / "out"
    options = {"pattern": "channel", "sparsity": 0.25, "repair": False, "nsamples": 2, "seqlen": 32}
    text = tmp_path / "text.txt"
    text.write_text("\n".join(vocabularies.LINES) * 20)
    with pytest.raises(UsageError, match="stock loaders want a whole `expand`"):
        compress(source, out=out, calib=str(text), **options)
    compress(source, out=out, calib=str(text), runtime="llama.cpp", **options)
    result = export(out)  # what it was compressed for is known
    assert result.format == "gguf"
    assert read_manifest(result.directory).dimensions["dt_rank"] == 9
    assert "fewer heads" in result.remarks[-1]
    with LlamaCpp(result.directory / "model.gguf") as llama:
        assert llama.log_probs([1, 2, 3], 392).max() < 0
    with pytest.raises(
        UsageError, match=r"whole multiple of d_model, here it is 36 and d_model 24\. Use --format gguf"
    ):
        export(out, format="safetensors")


def test_what_a_runtime_does_not_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no channels can go by themselves"):
        compress("tiny", out=tmp_path / "out", pattern="channel", runtime="llama.cpp")
    FAMILIES["jamba"](num_experts=1).save_pretrained(tmp_path / "jamba")
    with pytest.raises(UsageError, match="by themselves: leave channel out"):  # with width they do not go together
        compress(tmp_path / "jamba", out=tmp_path / "out", pattern="channel", runtime="llama.cpp")
    with pytest.raises(UsageError, match="multiples of 32 only"):
        compress("tiny-mamba2", out=tmp_path / "out", runtime="mlx-lm", round_to=8, **QUICK)
    with pytest.raises(UsageError, match=r"runtime.*'ollama'|ollama"):
        compress("tiny", out=tmp_path / "out", runtime="ollama")
    with pytest.raises(UsageError, match="no runtime 'ollama' to fit"):
        export("tiny", runtime="ollama")
    out = tmp_path / "out"
    compress("tiny-mamba2", out=out, sparsity=0.3, **QUICK)
    with pytest.raises(UsageError, match=r"mlx-lm does not run this model: .* here are 45. Compress with --for mlx-lm"):
        export(out, runtime="mlx-lm")
    with pytest.raises(UsageError, match="genai reads onnx, not gguf"):
        export(out, runtime="genai", format="gguf")
    with pytest.raises(UsageError, match="genai needs --target genai, not ort"):
        export(out, runtime="genai", target="ort")
    assert not [path for path in out.iterdir() if path.is_dir()]


def test_an_epsilon_that_mlx_lm_ignores_is_told_of(tmp_path):
    """Its norms always use 1e-5, silently."""
    source = tmp_path / "model"
    random_model(layer_norm_epsilon=1e-6).save_pretrained(source)
    compress(source, out=tmp_path / "out", sparsity=0.5, **QUICK)
    rows = {row.name: row for row in export(tmp_path / "out").runs_where}
    assert not rows["mlx-lm"].runs
    assert "silently wrong" in rows["mlx-lm"].remark
    with pytest.raises(UsageError, match="silently wrong"):
        export(tmp_path / "out", runtime="mlx-lm", force=True)
    assert misfit("mlx-lm", sizes(), 1e-5) is None


def test_what_a_runtime_never_runs_is_refused_before_compressing(tmp_path):
    """Nothing of these runs is calibrated: there is not even a text."""
    options = {"out": tmp_path / "out", "calib": tmp_path / "no-such-text.txt"}
    FAMILIES["zamba2"]().save_pretrained(tmp_path / "zamba2")
    with pytest.raises(
        UsageError, match=r"llama.cpp runs no models of the family zamba2.* one of transformers, vllm, onnx"
    ):
        compress(tmp_path / "zamba2", runtime="llama.cpp", **options)
    FAMILIES["jamba"]().save_pretrained(tmp_path / "jamba")
    with pytest.raises(UsageError, match=r"mlx-lm does not run this model, pruned or not: it weighs experts otherwise"):
        compress(tmp_path / "jamba", runtime="mlx-lm", **options)
    random_model(layer_norm_epsilon=1e-6).save_pretrained(tmp_path / "epsilon")
    with pytest.raises(UsageError, match=r"mlx-lm does not run this model, pruned or not: .*1e-06: silently wrong"):
        compress(tmp_path / "epsilon", runtime="mlx-lm", **options)
    random_model(intermediate_size=40).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UsageError, match=r"llama.cpp does not run this model, pruned or not: d_inner must be 2 x d_m"):
        compress(tmp_path / "narrow", runtime="llama.cpp", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("runtime", "pattern", "words"),
    [
        ("mlx-lm", "head", "states in multiples of 32 and silently loses others, here are 8"),
        ("vllm", "head-dim", "causal_conv1d wants a multiple of 8 channels, here are 44"),
        ("vllm", "width+head-dim", "causal_conv1d wants a multiple of 8 channels, here are 44"),
    ],
)
def test_sizes_that_a_runtime_does_not_run_are_refused_before_any_work(runtime, pattern, words, tmp_path):
    """Of whatever they are left by; the export would refuse them, after the work."""
    FAMILIES["nemotron_h"](layers_block_type=["linear_attention", "mlp"], mamba_head_dim=4).save_pretrained(
        tmp_path / "m"
    )
    with pytest.raises(UsageError, match=f"{runtime} does not run what would be left: .*{words}"):
        compress(tmp_path / "m", out=tmp_path / "out", pattern=pattern, sparsity=0.5, runtime=runtime, calib="no.txt")


def test_the_command_line_looks_at_the_tokenizer_and_all_else_first(tmp_path, capsys):
    """What only the format knows: how text is split, and what llama.cpp does not compute."""
    split = vocabularies.save(random_model(vocab_size=392, eos_token_id=0), tmp_path / "split", "other")
    biased = tmp_path / "biased"
    random_model(use_bias=True).save_pretrained(biased)
    options = ["--for", "llama.cpp", "--calib", "no-such-text.txt", "--out", tmp_path / "out"]
    for source, reason in ((split, "that GGUF files are written with"), (biased, "no biases in in_proj")):
        assert reason in run(capsys, "compress", source, *options).sentence(UsageError.exit_code)
        refuse_unfit(source, "transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mamba", "mamba2", *FAMILIES])
def test_families_that_software_has_not_are_those_without_an_export_for_it(family):
    architecture = architecture_for(family)
    for consumer in CONSUMERS.values():
        lacks = all_formats()[consumer.format].missing(architecture) is not None
        if consumer.format == "onnx" and not lacks:
            graph = LAYERS.find(family)
            lacks = consumer.options.get("target", PORTABLE) not in graph.TARGETS
        if consumer.format != "safetensors":  # else its own source says
            assert lacks == (consumer.name in architecture.capabilities.unknown_to), consumer.name


def test_what_software_silently_computes_otherwise_is_told(tmp_path):
    """Limits of time steps that only a prompt has, and experts."""
    FAMILIES["nemotron_h"](time_step_min=0.25).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", out=tmp_path / "out", sparsity=0.5, **QUICK)
    result = export(tmp_path / "out", runtime="transformers")
    assert "transformers silently computes something else than the model: it limits time steps" in result.remarks[0]
    rows = {row.name: row for row in result.runs_where}
    assert "it limits time steps to 0.25 at least in prompts, not token by token" in rows["transformers"].remark
    assert "it does not limit time steps to 0.25 at least" in rows["llama.cpp, CPU"].remark
    FAMILIES["jamba"]().save_pretrained(tmp_path / "jamba")
    compress(tmp_path / "jamba", out=tmp_path / "pruned", sparsity=0.5, **QUICK)
    rows = {row.name: row for row in export(tmp_path / "pruned").runs_where}
    assert not rows["mlx-lm"].runs
    assert rows["llama.cpp, CPU"].runs
    assert all(rows[name].runs for name in ("onnxruntime, CPU", "onnxruntime-genai", "OpenVINO, CPU"))
    assert "Mamba-1 by source" in rows["vLLM"].remark
    with pytest.raises(UsageError, match="mlx-lm does not run this model: it weighs experts otherwise"):
        export(tmp_path / "pruned", runtime="mlx-lm", force=True)
    assert not architecture_for("jamba").otherwise(FAMILIES["jamba"](num_experts=1).config)
    assert not architecture_for("bamba").otherwise(FAMILIES["bamba"]().config)


def test_what_one_release_does_otherwise_does_not_refuse_the_others():
    """Zamba2's prompts are wrong in transformers 4.57 only; a Falcon-H1 is wrong in mlx-lm if its keys are scaled."""
    zamba, config = architecture_for("zamba2"), FAMILIES["zamba2"]().config
    assert computes_otherwise("transformers", zamba, config, wrong=True) is None
    assert computes_otherwise("transformers", zamba, config, wrong=True, version="5.24.0") is None
    assert "prompts of more than 16" in computes_otherwise("transformers", zamba, config, wrong=True, version="4.57.6")
    rows = {row.name: row for row in runs_where(zamba.dimensions(config), 8, "zamba2", None, zamba.otherwise(config))}
    assert rows["transformers"].runs
    assert "its release 4.57" in rows["transformers"].remark
    for family in ("jamba", "granitemoehybrid"):  # their heads are as wide as d_model has it in 4.57
        attends, whole = architecture_for(family), FAMILIES[family]().config
        assert refuses("transformers", attends, whole, version="4.57.6") is None
        narrow = FAMILIES[family](head_dim=whole.hidden_size // whole.num_attention_heads, num_attention_heads=2).config
        assert "query heads are gone" in refuses("transformers", attends, narrow, version="4.57.6")
        assert refuses("transformers", attends, narrow, version="5.24.0") is None
    falcon = architecture_for("falcon_h1")
    plain, scaled = (FAMILIES["falcon_h1"](key_multiplier=k, attention_in_multiplier=1.0).config for k in (1.0, 0.7))
    assert computes_otherwise("mlx-lm", falcon, plain, wrong=True) is None
    assert "does not scale keys" in computes_otherwise("mlx-lm", falcon, scaled, wrong=True)


def test_the_table_of_runtimes_says_the_same():
    for count, dims in ((48, sizes(random_mamba2, state_size=48)), (64, sizes(random_mamba2, state_size=64))):
        rows = {row.name: row for row in runs_where(dims, 128, "mamba2")}
        assert rows["mlx-lm"].runs == (misfit("mlx-lm", dims) is None) == (count % 32 == 0)
        assert rows["llama.cpp, CPU"].runs
        assert rows["llama.cpp, CPU"].reads == "gguf"
    narrow = {row.name: row for row in runs_where(sizes(intermediate_size=40), 16, "mamba")}
    assert not narrow["llama.cpp, CPU"].runs
    assert "2 x d_model, here it is 40 and d_model 24" in narrow["llama.cpp, CPU"].remark


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_takes_every_family(tmp_path, family):
    """Also hybrids whose width is no multiple of theirs."""
    FAMILIES[family]().save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", out=tmp_path / "out", sparsity=0.5, runtime="transformers", **QUICK)
    folder = export(tmp_path / "out", runtime="transformers").directory
    assert json.loads((folder / "ssmc.json").read_text())["format"] == "safetensors"
    assert load_checkpoint(folder).dimensions.d_state == 4
