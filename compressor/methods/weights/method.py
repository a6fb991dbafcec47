"""Single weights, as the rest of ssmc sees them: of the mixer's modules, and of what a hybrid has beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmc.compressor.methods.method import Job, Method, Outcome, Plan, Survey, Table
from ssmc.compressor.methods.registry import register_method
from ssmc.compressor.methods.weights import scores as scores  # registers them
from ssmc.compressor.options.config import PROJECTIONS
from ssmc.compressor.options.patterns import WEIGHTS, looks_at_text
from ssmc.compressor.options.sparsity import Sparsity

if TYPE_CHECKING:
    from ssmc.compressor.methods.weights.projections import ModuleResult

_OTHERS = (
    "The linear maps of attention and MLP were pruned in the same way. Experts of a mixture are one tensor for all of "
    "them, and routers decide between them: these stay dense."
)
_SHARED = "The transformer blocks that layers share, and the maps behind them, stay dense: a layer at a time is pruned."


class Weights(Method):
    """Single weights of the projections and of conv1d, where they are in scope."""

    name = "weights"
    leaves = ("weights",)
    place = 40

    def asked_for(self, plan: Plan) -> bool:
        """By the scope."""
        return bool(plan.config.modules)

    def needs_text(self, plan: Plan) -> bool:
        """As the score says."""
        return looks_at_text(WEIGHTS, plan.config.ffn_score)

    def prepare(self, survey: Survey) -> list[dict[str, Sparsity]]:
        """How sparse each module of each layer becomes."""
        from ssmc.compressor.methods.weights.projections import sparsities_of_modules

        return sparsities_of_modules(survey)

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def prune(self, job: Job) -> None:
        """After the states, so that x_proj and out_proj are fitted to the pruned scan."""
        from ssmc.compressor.methods.weights.projections import prune_modules

        prune_modules(job, job.prepared[self.name][job.index])
        if len(job.states_kept) < len(job.plan.all_states):
            job.architecture.mask_states(job.mixer, job.states_kept)  # an update may have woken a silent row

    def notes(self, outcome: Outcome) -> list[str]:
        """That zeros alone make nothing faster."""
        nm = outcome.plan.config.nm
        if nm is None:
            return [
                "Zeros spread over the projections make nothing smaller or faster by themselves: dense formats store "
                "them and dense products multiply by them."
            ]
        return [
            f"The file stays as large: {nm} zeros are stored. GPUs with sparse tensor cores can use 2:4 "
            "(ssmc export --format sparse24); on a CPU nothing gets faster."
        ]

    def tables(self, outcome: Outcome) -> list[Table]:
        """Sparsity of every module in every layer: Eq. 7 shows in the columns of in_proj and out_proj."""
        modules = [() if layer.weights is None else layer.weights.modules for layer in outcome.layers]
        with_mixers = [found for found, layer in zip(modules, outcome.layers, strict=True) if layer.states_kept]
        first: tuple[ModuleResult, ...] = with_mixers[0] if with_mixers else ()
        names = [module.name for module in first if "." not in module.name]
        others = [module for found in modules for module in found if module.name not in names]
        rows = tuple(_row(index, found, names) for index, found in enumerate(modules))
        left_out = [f"{module.name} left out: {module.left_out}" for module in first if module.left_out is not None]
        legend = "zeros, and squared error of the module's output relative to the output."
        caption = left_out[-1] if left_out else _of_others(others)
        return [Table("Weights of modules", ("layer", *names), rows, legend, caption)]


def _row(index: int, modules: tuple[ModuleResult, ...], names: list[str]) -> tuple[str, ...]:
    cells = {m.name: f"{m.zeros:.1%}" + ("" if m.error is None else f" ({m.error:.1e})") for m in modules}
    return str(index), *(cells.get(name, "") for name in names)


def _of_others(others: list[ModuleResult]) -> str:
    if not others:
        return ""
    errors = [m.error for m in others if m.error is not None]
    mean = sum(m.zeros for m in others) / len(others)
    most = f" (at most {max(errors):.1e})" if errors else ""
    return f"and {len(others)} linear maps of attention and MLP: {mean:.1%}{most}"


class OtherMaps(Method):
    """The linear maps of attention and MLP of a hybrid, where all modules of the mixers are in scope."""

    name = "other maps"
    leaves = ("weights",)
    place = 60
    in_every_block = True

    def asked_for(self, plan: Plan) -> bool:
        """By the scope."""
        return not plan.architecture.capabilities.uniform and set(plan.config.modules) == set(PROJECTIONS)

    def needs_text(self, plan: Plan) -> bool:
        """As the score says."""
        return looks_at_text(WEIGHTS, plan.config.ffn_score)

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def prune(self, job: Job) -> None:
        """Last, on what the pruned mixer puts out."""
        from ssmc.compressor.methods.weights.projections import prune_linears

        prune_linears(job)

    def notes(self, outcome: Outcome) -> list[str]:
        """What stays dense."""
        return [_SHARED if outcome.plan.architecture.capabilities.shared_blocks else _OTHERS]


register_method(Weights())
register_method(OtherMaps())
