"""`ssmc distill` and `ssmc compress --distill` from end to end on the embedded model, with few and short sequences."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ssmc.runtime.models.checkpoints import load_checkpoint

CHANNELS = ("--pattern", "channel", "--sparsity", "0.25", "--nsamples", "4", "--seqlen", "128")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A quarter of the channels removed."""
    from ssmc.cli import main

    out = tmp_path_factory.mktemp("distill") / "made"
    assert main(["compress", "tiny", *CHANNELS, "--out", str(out), "--quiet"]) in (0, None)
    return out


def silent_channels(folder):
    """Which columns of out_proj are zero, layer by layer."""
    tensors = load_file(folder / "model.safetensors")
    return [(tensors[f"backbone.layers.{i}.mixer.out_proj.weight"] == 0).all(dim=0) for i in range(6)]


def test_an_artefact_is_distilled_into_a_folder_beside_it_and_can_be_exported(artefact, capsys):
    from ssmc.cli import main

    assert main(["distill", str(artefact), "--steps", "6", "--seqlen", "64"]) in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    out = artefact.with_name("made-distilled")
    manifest = json.loads((out / "ssmc.json").read_text("utf-8"))
    done = manifest["distilled"]
    assert done["divergence"] < done["divergence_before"]
    assert "Distilled for 6 steps of 256 tokens" in said
    assert all(torch.equal(a, b) for a, b in zip(silent_channels(out), silent_channels(artefact), strict=True))
    assert main(["export", str(out), "--quiet"]) in (0, None)  # which compares with the masked model
    assert load_checkpoint(out / "safetensors").dimensions.d_inner == 384
    assert main(["distill", str(artefact), "--steps", "1"]) == 5  # the folder is there already


def test_compress_distils_when_it_is_told_to_and_repeats_itself(artefact, tmp_path):
    from ssmc.cli import main

    for name in ("one", "two"):
        assert main(["compress", "tiny", *CHANNELS, "--distill", "2", "--out", str(tmp_path / name), "-q"]) in (0, None)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != (artefact / "model.safetensors").read_bytes()
    assert "distill: 2" in (tmp_path / "one" / "recipe.yaml").read_text("utf-8")


def test_a_result_that_few_would_use_is_called_so_in_the_last_line(tmp_path, capsys):
    from ssmc.cli import main

    short = ("--nsamples", "4", "--seqlen", "128", "--distill", "1")
    layers = ("--pattern", "layer", "--score", "similarity", "--sparsity", "0.6")
    for name, options, said in (("layers", layers, True), ("states", ("--sparsity", "0.5"), False)):
        assert main(["compress", "tiny", *short, *options, "--out", str(tmp_path / name)]) in (0, None)
        outcome = capsys.readouterr()
        lines = (outcome.out + outcome.err).strip()
        assert ("Few would use it" in " ".join(lines[-400:].split())) == said


def test_what_is_no_artefact_is_refused(tmp_path, capsys):
    from ssmc.cli import main

    assert main(["distill", str(tmp_path)]) == 2
    assert "holds no compressed model" in capsys.readouterr().err
