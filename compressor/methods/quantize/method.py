"""Quantisation as the rest of ssmc sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.method import Job, Method, Outcome, Plan, Record, Survey, Table
from ssmc.compressor.methods.registry import register_method
from ssmc.compressor.methods.tables import error_text
from ssmc.compressor.options.patterns import NOTHING, Pattern
from ssmc.compressor.options.quantization import BITS, RTN, W8

if TYPE_CHECKING:
    import torch

    from ssmc.compressor.methods.quantize.modules import QuantizedModule

EXPERTS = "Experts of a mixture are one tensor for all of them, and their routers decide between them: both stay."
SHARED = "The transformer blocks that layers share, and the maps behind them, stay as they are."


class Quantize(Method):
    """Weights of the linear maps of a layer in few bits, after everything that prunes, repairs and refines it."""

    name = "quantize"
    leaves = ("quantized",)
    place = 90
    in_every_block = True
    whole_model = True  # its codes are written together, at the end
    follows_dense = True  # in_proj and out_proj are fitted to the dense model's residual stream before their turns
    pattern = Pattern(NOTHING, "weights", "`none` (nothing, to quantise alone)", "")

    def asked_for(self, plan: Plan) -> bool:
        """By the option of its name."""
        return plan.config.quantize is not None

    def needs_text(self, plan: Plan) -> bool:
        """All but rounding to nearest."""
        return plan.config.quantize_method != RTN

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def prepare_outside(self, survey: Survey) -> Record | None:
        """The embedding, and the head where it is not the same, before the first layer reads anything."""
        if survey.plan.config.quantize_embedding is None:
            return None
        from ssmc.compressor.methods.quantize.outside import quantize_embedding

        return quantize_embedding(survey)

    def arrive(self, job: Job, dense: torch.Tensor) -> None:
        """What in_proj reads is compared before the dense stream goes on."""
        from ssmc.compressor.methods.quantize.modules import may_fit
        from ssmc.compressor.methods.units.inputs import estimate_first

        if may_fit(job, "in_proj"):
            job.worked_out[self.name] = estimate_first(job, dense)

    def prune(self, job: Job) -> None:
        """Module after module, each on what the quantised ones before it put out."""
        from ssmc.compressor.methods.quantize.modules import quantize_layer

        quantize_layer(job)

    def notes(self, outcome: Outcome) -> list[str]:
        """What stays as it is, and what becomes of the file."""
        config, able = outcome.plan.config, outcome.plan.architecture.capabilities
        bits = BITS[config.quantize or W8]
        notes = [
            f"The masked model holds the values of its {bits}-bit codes as ordinary numbers, so its file is no "
            "smaller. The codes are in exports of --format compressed-tensors, and of --format onnx or gguf with "
            "--quantize codes."
        ]
        if not able.uniform:
            notes.append(SHARED if able.shared_blocks else EXPERTS)
        return notes

    def tables(self, outcome: Outcome) -> list[Table]:
        """The error of every module in every layer."""
        found = [() if layer.quantized is None else layer.quantized.modules for layer in outcome.layers]
        names = list(dict.fromkeys(module.name for modules in found for module in modules if "." not in module.name))
        others = any("." in module.name for modules in found for module in modules)
        heads = ("layer", *names, *(("maps of attention and MLP",) if others else ()))
        rows = tuple(_row(index, modules, names)[: len(heads)] for index, modules in enumerate(found))
        left = next((m for modules in found for m in modules if m.left_out is not None), None)
        caption = "" if left is None else f"{left.name} left out: {left.left_out}"
        legend = "bits and inputs that share a scale; squared error of the module's output relative to the output."
        return [Table("Weights in few bits", heads, rows, legend, caption)]


def _row(index: int, modules: tuple[QuantizedModule, ...], names: list[str]) -> tuple[str, ...]:
    cells = {module.name: _cell(module) for module in modules}
    others = [module for module in modules if module.name not in names and module.stored is not None]
    errors = [module.error for module in others if module.error is not None]
    more = f"{len(others)}" + (f" (at most {max(errors):.1e})" if errors else "") if others else ""
    return str(index), *(cells.get(name, "") for name in names), more


def _cell(module: QuantizedModule) -> str:
    if module.stored is None:
        return "as it was"
    shape = module.stored.shape
    return f"w{shape.bits} g{shape.group}" + ("" if module.error is None else f" ({error_text(module.error)})")


register_method(Quantize())
