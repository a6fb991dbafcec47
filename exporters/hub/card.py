"""The model card of an export, in the hub's metadata format, written from its manifest and from measured figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ssmc.exporters.hub.files import Export, base_of
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"
_LIBRARIES = {"safetensors": "transformers", "sparse24": "transformers", "onnx": "onnx", "gguf": "gguf"}
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_TAKEN_OVER = ("license", "license_name", "license_link", "language", "datasets")
_LICENCES = {"apache": "apache-2.0", "mit license": "mit"}  # how the text of a licence begins -> its name on the hub
_SCHEMAS = ("ssmc-bench/", "ssmc-eval/")


@dataclass(frozen=True)
class Facts:
    """What a card says beside what stands in the manifest.

    Attributes:
        repository: where it is published, "owner/name".
        base_model: of the hub; None: the manifest's, where that is of the hub.
        license: of the model; None: that of the model it was made from.
        figures: bench.json or eval.json files with measurements of the export.
    """

    repository: str
    base_model: str | None = None
    license: str | None = None
    figures: tuple[Path, ...] = ()


def make_card(export: Export, facts: Facts) -> str:
    """README.md of the repository.

    Raises:
        UsageError: a file of figures is none, or the metadata make no sense.
    """
    from huggingface_hub import ModelCardData

    manifest, measured = export.manifest, [row for path in facts.figures for row in _figures(path, export)]
    base = facts.base_model or base_of(manifest)
    taken: dict[str, Any] = {key: value for key, value in _front_matter(export.readme).items() if key in _TAKEN_OVER}
    taken["license"] = facts.license or taken.get("license") or _license_of(export)
    if facts.license:
        taken = {key: value for key, value in taken.items() if not key.startswith("license_")}
    relation: dict[str, Any] = {"base_model_relation": _relation(export)} if base else {}
    try:
        data = ModelCardData(
            base_model=base,
            library_name=_LIBRARIES.get(manifest.format or "", manifest.format),
            pipeline_tag=TASK,
            tags=_tags(export),
            model_name=facts.repository.split("/")[-1],
            eval_results=[row.result for row in measured] or None,
            **taken,
            **relation,
        )
        front = data.to_yaml()
    except Exception as error:  # the client's own checks, and YAML's
        raise UsageError(
            f"The metadata of the model card make no sense ({error}). Correct --base-model or --license."
        ) from error
    return f"---\n{front}\n---\n\n" + "\n\n".join(_body(export, facts, base, measured)) + "\n"


def _body(export: Export, facts: Facts, base: str | None, measured: list[_Row]) -> list[str]:
    manifest = export.manifest
    config = manifest.config or {}
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(manifest.source.model or 'a model').name}`"
    made = "made smaller by" if config else "exported by"
    parts = [
        f"# {facts.repository.split('/')[-1]}",
        f"{name}, {made} ssmc {manifest.versions.get('ssmc', '')}.".replace(" .", "."),
    ]
    if config:
        parts += ["## What was removed", _removed(config), *_cuts(export)]
    parts += ["## What was checked", _checked(manifest.comparison)]
    if measured:
        head = "| what | value | on |\n|---|---|---|\n"
        parts += ["## Figures", head + "\n".join(f"| {row.name} | {row.value} | {row.where} |" for row in measured)]
    parts += ["## Made by", "```bash\n" + "\n".join(_commands(manifest.format, config)) + "\n```"]
    parts += ["`ssmc.json` has every option, version and hash."]
    if export.readme:
        parts += ["The README of the model it was made from is `README-model.md`."]
    return parts


@dataclass(frozen=True)
class _Row:
    """One measured figure, for people and for the hub."""

    name: str
    value: str
    where: str
    result: EvalResult


def _figures(path: Path, export: Export) -> list[_Row]:
    """The figures of the export in a report of `bench` or `eval`."""
    try:
        report = json.loads(path.expanduser().read_text(encoding="utf-8"))
        if not str(report["schema"]).startswith(_SCHEMAS):
            raise ValueError("another schema")
        found = [model for model in report["models"] if model.get("parameters") == export.manifest.parameters]
        found = [model for model in found if not model["dense"]] or found
        if not found:
            raise UsageError(
                f"{path} has no model of {export.manifest.parameters} parameters, so none of its figures are of this "
                "export. Measure the export itself."
            )
        return _rows(found[0], report)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Name a bench.json or eval.json.") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no report of `ssmc bench` or `ssmc eval`. Name a bench.json or eval.json."
        ) from error


def _rows(model: Mapping[str, Any], report: Mapping[str, Any]) -> list[_Row]:
    rows = []
    if model.get("perplexity"):
        text = Path(str(report["text"]["source"])).name
        rows.append(_row("perplexity", float(model["perplexity"]["ppl"]), text))
        if model.get("excess"):
            rows.append(_row("loss above the dense model, nats a token", float(model["excess"]["nats"]), text))
    for score in model.get("scores") or ():
        if score["metric"] != "perplexity":
            rows.append(_row(str(score["metric"]), float(score["value"]), str(score["task"])))
    return rows


def _row(metric: str, value: float, where: str) -> _Row:
    from huggingface_hub import EvalResult

    kind = re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_")
    result = EvalResult(TASK, where, where, kind, round(value, 6), task_name="Text generation", metric_name=metric)
    return _Row(metric, f"{value:.4g}", where, result)


def _front_matter(readme: str | None) -> dict[str, Any]:
    """The metadata of a README of the hub; nothing where there are none that can be read."""
    match = _FRONT.match(readme or "")
    try:
        content = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}


def _license_of(export: Export) -> str | None:
    """The licence that lies in the folder, where its text is one that the hub has a name for."""
    for name, path in export.files.items():
        if name.upper().startswith(("LICENSE", "LICENCE")):
            start = " ".join(path.read_text(encoding="utf-8", errors="replace")[:400].lower().split())
            return next((known for begins, known in _LICENCES.items() if start.startswith(begins)), "other")
    return None


def _tags(export: Export) -> list[str]:
    manifest = export.manifest
    tags = ["ssmc", "state-space-model", str(manifest.format)]
    tags += ["pruned"] if manifest.config else []
    tags += ["quantized"] if _is_quantised(export) else []
    return list(dict.fromkeys(tags))


def _relation(export: Export) -> str:
    """In the hub's words, which has none for pruned models."""
    return "quantized" if _is_quantised(export) or export.manifest.format == "gguf" else "finetune"


def _is_quantised(export: Export) -> bool:
    settings = [entry for entry in export.manifest.about.values() if isinstance(entry, dict)]
    chosen = {str(entry.get("quantize")) for entry in (*settings, export.manifest.config or {})}
    return bool(chosen - {"None", "f32", "f16", "bf16"})


def _removed(config: Mapping[str, Any]) -> str:
    sparsity = config.get("sparsity")
    share = ", ".join(f"{part} {value}" for part, value in sparsity.items()) if isinstance(sparsity, dict) else sparsity
    repair = "with" if config.get("repair") else "without"
    score = config.get("score") or "the default"
    return f"Pattern `{config.get('pattern')}`, sparsity {share}, importance score {score}, {repair} repair."


def _cuts(export: Export) -> list[str]:
    """Sizes by name, and the tensors that got smaller."""
    manifest = export.manifest
    sizes = ", ".join(f"{name} {value}" for name, value in manifest.dimensions.items())
    said = [f"Sizes: {sizes}; {manifest.parameters:,} parameters."] if manifest.parameters else []
    if manifest.cuts:
        said.append(f"{len(manifest.cuts)} tensors got smaller, all others keep their shape.")
    return said


def _checked(comparison: Mapping[str, Any]) -> str:
    difference, largest = comparison.get("max_difference"), comparison.get("largest_logit")
    if difference is None:
        return "The files were not compared with the model they were made from."
    kind = "real text" if comparison.get("real_text") else "random tokens"
    return (
        f"The written files were run beside the model they were made from, on {comparison.get('tokens')} tokens of "
        f"{kind}: the largest difference of a logit is {difference:.2e} (largest logit {largest:.3g})."
    )


def _commands(format: str | None, config: Mapping[str, Any]) -> list[str]:
    """What repeats it; the recipe has what a command line would leave to defaults."""
    compress = ["ssmc compress --recipe recipe.yaml"] if config else []
    return [*compress, f"ssmc export --format {format}"]
