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
    assert "Distilled for 6 steps of 2048 tokens" in said
    assert all(torch.equal(a, b) for a, b in zip(silent_channels(out), silent_channels(artefact), strict=True))
    assert main(["export", str(out), "--quiet"]) in (0, None)  # which compares with the masked model
    assert load_checkpoint(out / "safetensors").dimensions.d_inner == 384
    assert main(["distill", str(artefact), "--steps", "1"]) == 5  # the folder is there already


@pytest.fixture
def interrupted_after_two_savings(monkeypatch):
    """As Ctrl-C after the state was saved for the second time."""
    from ssmc.compressor.distillation.state import StateFile

    save, saved = StateFile.save, []

    def save_and_stop(self, run, state):
        save(self, run, state)
        saved.append(state["step"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "save", save_and_stop)
    yield saved
    monkeypatch.undo()


def test_an_interrupted_run_goes_on_to_the_same_bytes(artefact, tmp_path, capsys, interrupted_after_two_savings):
    from ssmc.cli import main

    short, out = ("--steps", "5", "--seqlen", "64"), tmp_path / "out"
    distil = ["distill", str(artefact), *short, "--out", str(out)]
    assert main([*distil, "--resume"]) == 2
    assert "no interrupted distillation" in capsys.readouterr().err
    assert main(distil) == 130
    assert "--resume goes on" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
    assert main(distil) == 2  # what was done is not thrown away unasked
    assert "Go on with it by --resume" in " ".join(capsys.readouterr().err.split())
    assert main([*distil, "--resume", "--seed", "1"]) == 2
    assert "other options" in capsys.readouterr().err
    assert main([*distil, "--resume", "--quiet"]) in (0, None)
    assert interrupted_after_two_savings == [1, 2, 3, 4]  # nothing was done twice
    assert not (tmp_path / "out.distilling").exists()
    assert main(["distill", str(artefact), *short, "--out", str(tmp_path / "whole"), "--quiet"]) in (0, None)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == two


def test_compress_distils_when_it_is_told_to_and_goes_on_to_the_same_bytes(
    artefact, tmp_path, capsys, interrupted_after_two_savings
):
    from ssmc.cli import main

    made = ["compress", "tiny", *CHANNELS, "--distill", "3", "--quiet", "--out"]
    assert main([*made, str(tmp_path / "one")]) == 130
    assert main([*made, str(tmp_path / "one"), "--resume"]) in (0, None)
    assert main([*made, str(tmp_path / "two")]) in (0, None)
    assert interrupted_after_two_savings == [1, 2, 1, 2]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != (artefact / "model.safetensors").read_bytes()
    assert "distill: 3" in (tmp_path / "one" / "recipe.yaml").read_text("utf-8")
    assert main([*made, str(tmp_path / "three"), "--resume"]) == 2
    assert "no interrupted distillation" in capsys.readouterr().err


def test_a_damaged_state_is_refused(artefact, tmp_path, capsys):
    from ssmc.cli import main

    (tmp_path / "out.distilling").write_bytes(b"not a state")
    assert main(["distill", str(artefact), "--seqlen", "64", "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert "damaged" in " ".join(capsys.readouterr().err.split())


def test_a_result_that_few_would_use_is_called_so_in_the_last_line(tmp_path, capsys):
    from ssmc.cli import main

    short = ("--nsamples", "4", "--seqlen", "128", "--distill", "1")
    layers = ("--pattern", "layer", "--score", "similarity", "--sparsity", "0.6")
    for name, options, said in (("layers", layers, True), ("states", ("--sparsity", "0.5"), False)):
        assert main(["compress", "tiny", *short, *options, "--out", str(tmp_path / name)]) in (0, None)
        outcome = capsys.readouterr()
        lines = (outcome.out + outcome.err).strip()
        assert ("Few would use it" in " ".join(lines[-400:].split())) == said
    assert main(["distill", str(tmp_path / "layers"), "--steps", "1", "--seqlen", "64"]) in (0, None)
    outcome = capsys.readouterr()
    assert "Few would use it" in " ".join((outcome.out + outcome.err).strip()[-400:].split())


def test_what_is_no_artefact_is_refused(tmp_path, capsys):
    from ssmc.cli import main

    assert main(["distill", str(tmp_path)]) == 2
    assert "holds no compressed model" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3", "1.5", "many", ""])
def test_steps_that_are_none_are_refused(artefact, steps, capsys):
    from ssmc.cli import main

    assert main(["distill", str(artefact), "--steps", steps]) == 2
    assert "a whole number of at least 1, or auto" in " ".join(capsys.readouterr().err.split())
