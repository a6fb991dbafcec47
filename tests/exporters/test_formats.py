"""The export pipeline around the formats: registry, options, manifests, and what is refused before any work."""

import json
import shutil
from dataclasses import dataclass

import pytest
from safetensors.torch import load_file, save_file

from ssmc.compressor import compress
from ssmc.exporters import Format, Proof, all_formats, export, option, register_format
from ssmc.exporters.registry import missing_formats
from ssmc.exporters.verify import compare
from ssmc.runtime.errors import CheckpointError, OutputError, UsageError
from ssmc.runtime.manifest import read_compressed, read_manifest
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.versions import versions
from tests.support.families import falcon_mamba, jamba


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress("tiny", out=out, sparsity=0.5, score="magnitude", repair=False)
    return out


@pytest.fixture
def copy(artefact, tmp_path):
    """An artefact that a test may damage."""
    return shutil.copytree(artefact, tmp_path / "copy")


def edit(folder, change):
    path = folder / "ssmc.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_format_is_one_class(artefact, tmp_path):
    """From outside the package: write, verify and options in one place; the pipeline does the rest."""

    @dataclass(frozen=True)
    class Choices:
        suffix: str = option("what the file ends on", ".st", choices=(".st", ".tensors"))

    class Plain(Format):
        name = "plain-test"
        help = "tensors and nothing else"
        Options = Choices

        def space(self, job):
            return 0

        def write(self, job, folder):
            save_file(job.tensors(), folder / f"plain{job.options.suffix}")
            return [folder / f"plain{job.options.suffix}"]

        def weight_bytes(self, job, folder):
            return (folder / f"plain{job.options.suffix}").stat().st_size

        def verify(self, job, folder):
            model, tokens = job.source.checkpoint.model, job.tokens
            return Proof(compare(model, model, tokens.sample, tokens.real), remarks=("as it should be",))

    register_format(Plain())
    assert "plain-test" in all_formats()
    result = export(artefact, format="plain-test", suffix=".tensors", out=tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "plain.tensors")
    assert stored["backbone.layers.0.mixer.A_log"].shape == (512, 8)
    assert result.remarks == ("as it should be",)
    assert {"plain.tensors", "tokenizer.json"} <= json.loads((tmp_path / "plain/ssmc.json").read_text())["files"].keys()
    with pytest.raises(UsageError, match="an option of the format plain-test, not of safetensors"):
        export(artefact, suffix=".st")
    with pytest.raises(ValueError, match="already"):
        register_format(Plain())


def test_an_existing_export_is_refused_before_anything_is_read(copy):
    (copy / "safetensors").mkdir()
    (copy / "safetensors" / "ssmc.json").write_text("{}")
    (copy / "model.safetensors").write_bytes(b"")  # reading it would be another error
    with pytest.raises(OutputError, match="--force"):
        export(copy)


def test_an_export_knows_what_exported_it_and_what_compressed_it(copy):
    edit(copy, lambda content: content["versions"].update(ssmc="0.0.7"))
    manifest = read_manifest(export(copy).directory)
    assert manifest.versions == versions()
    assert manifest.compressed_with["ssmc"] == "0.0.7"
    assert read_manifest(copy).versions["ssmc"] == "0.0.7"


def as_schema_1(content):
    """What ssmc 0.1 wrote of the same run."""
    content["schema"] = 1
    for removal in content["removed"]:
        del removal["part"]
    for layer in content["layers"]:
        for module in layer["modules"]:
            reason = module.pop("left_out")
            module["target"] = module["target"] if reason is None else f"left out: {reason}"


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "layer+column", "score": "similarity", "sparsity": 0.34, "nsamples": 2, "seqlen": 128},
        {"pattern": "ssm-module", "score": "random", "sparsity": 0.34},
        {"pattern": "4:16", "ffn_score": "magnitude"},
    ],
)
def test_manifests_of_the_first_release_are_read(tmp_path, options):
    out = tmp_path / "out"
    compress("tiny", out=out, **options)
    now = read_compressed(out)
    edit(out, as_schema_1)
    then = read_compressed(out)
    assert (then.layers, then.removed) == (now.layers, now.removed)
    export(out)
    old = json.loads((out / "safetensors" / "ssmc.json").read_text())
    (out / "safetensors" / "ssmc.json").write_text(json.dumps(old | {"schema": 1, "versions": {"ssmc": "0.1.0"}}))
    exported = read_manifest(out / "safetensors")
    assert (exported.versions, exported.compressed_with) == ({}, {"ssmc": "0.1.0"})


def test_damaged_manifests_are_a_clear_error(copy):
    edit(copy, lambda content: content["layers"][0].pop("kept"))
    with pytest.raises(CheckpointError, match=r"ssmc\.json is damaged .*compress"):
        export(copy)
    edit(copy, lambda content: content.update(schema=9))
    with pytest.raises(CheckpointError, match="schema 9, this ssmc reads 1 and 2"):
        export(copy)


def test_families_say_which_formats_they_lack(tmp_path):
    for make, lacks in ((falcon_mamba, {"mamba-ssm"}), (jamba, {"mamba-ssm", "sparse24"})):
        make().save_pretrained(tmp_path / make.__name__)
        assert lacks <= set(missing_formats(load_checkpoint(tmp_path / make.__name__).architecture))
    with pytest.raises(UsageError, match="mamba_ssm has no models of type falcon_mamba"):
        export(tmp_path / "falcon_mamba", format="mamba-ssm", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
