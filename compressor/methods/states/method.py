"""The methods of this folder, as the rest of ssmc sees them: whole states, and single entries of A_log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ssmc.compressor.methods.method import Job, LayerResult, Method, Outcome, Plan, Survey, Table
from ssmc.compressor.methods.registry import register_method, score
from ssmc.compressor.methods.states import scores as scores  # registers them
from ssmc.compressor.methods.states.counts import states_of_layers
from ssmc.compressor.methods.states.score import StateScore
from ssmc.compressor.methods.tables import error_text, ranges
from ssmc.compressor.options.patterns import COLUMN, UNSTRUCTURED, Pattern, looks_at_text
from ssmc.compressor.options.sparsity import check_groups
from ssmc.runtime.errors import UsageError


def refuse_unfit(plan: Plan, part: str) -> None:
    """Refuse a score that cannot decide about states or entries of this model.

    Raises:
        UsageError: with the score's reason.
    """
    if reason := cast(StateScore, score(part, plan.config.score_of(part))).refusal(plan):
        raise UsageError(reason)


class States(Method):
    """Whole states, with the repair that folds into what reads them."""

    name = "states"
    leaves = ("states",)
    place = 20
    pattern = Pattern(COLUMN, "states", "`column` (whole states)", "exact", combines=2, takes_scope=True)

    def asked_for(self, plan: Plan) -> bool:
        """By the pattern, where A_log is in scope."""
        return COLUMN in plan.config.parts and plan.config.prunes_a_log

    def needs_text(self, plan: Plan) -> bool:
        """For the repair, and for most scores."""
        return plan.config.repair or looks_at_text(COLUMN, plan.config.score_of(COLUMN))

    def check(self, plan: Plan) -> None:
        """Not every score can tell states apart in every family."""
        refuse_unfit(plan, COLUMN)

    def shares_samples(self, plan: Plan) -> bool:
        """Sums and gradients add up."""
        return True

    def keep(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Numbers of states."""
        return {"states": states_of_layers(plan)}

    def prepare(self, survey: Survey) -> Any:
        """How much each calibration token counts."""
        from ssmc.compressor.methods.states.weights import token_weights

        return None if survey.tokens is None else token_weights(survey.tokens, survey.plan.config.recall_weight)

    def prune(self, job: Job) -> None:
        """A layer that keeps all of its states is left out."""
        from ssmc.compressor.methods.states.prune import prune_states

        if job.plan.keep.states[job.index] < job.plan.sizes.d_state:
            prune_states(job)

    def notes(self, outcome: Outcome) -> list[str]:
        """On decode kernels that pad states, and on norms over the states."""
        plan, keep = outcome.plan, max(outcome.plan.keep.states)
        found = []
        if keep < plan.sizes.d_state and keep & (keep - 1):
            found.append(_padding(plan.sizes.d_state, keep))
        if plan.architecture.capabilities.normed_readers:
            records = [layer.states for layer in outcome.layers if layer.states is not None]
            spreads = [record.norm_spread for record in records if record.norm_spread is not None]
            found.append(_norms(plan.sizes.d_state, keep, spreads, plan.config.repair))
        return found

    def tables(self, outcome: Outcome) -> list[Table]:
        """Which states stay in each layer, and the errors."""
        dense = len(outcome.plan.all_states)
        rows = tuple(_row(index, layer) for index, layer in enumerate(outcome.layers))
        columns = ("layer", f"kept of {dense}", "states that stay", "error", "without repair")
        legend = "error: squared difference of the layer's gated output, relative to the output."
        return [Table("States", columns, rows, legend)] if rows else []


def _row(index: int, layer: LayerResult) -> tuple[str, ...]:
    if not layer.states_kept:
        return str(index), "", "no state-space mixer"
    record = layer.states
    unrepaired = error_text(record.error_unrepaired) if record is not None and record.repaired else ""
    error = error_text(None if record is None else record.error)
    return str(index), str(len(layer.states_kept)), ranges(layer.states_kept), error, unrepaired


def _norms(dense_states: int, keep: int, spreads: Sequence[float], repaired: bool) -> str:
    """What the norms of B and C do with fewer states."""
    note = "B and C pass norms over the states, which are others when states are gone. "
    if spreads:
        folded = "its mean is folded into the weights" if repaired else "nothing is folded without repair"
        note += (
            f"What is read out is off by a factor that varies by {sum(spreads) / len(spreads):.1%} from token to token "
            f"(standard deviation, mean of the layers; most in a layer: {max(spreads):.1%}); {folded}, the errors have "
            "the rest in them. "
        )
    note += "The export computes what the masked model does."
    if dense_states % keep or (dense_states // keep) & (dense_states // keep - 1):
        note += (
            f" The factor {dense_states}/{keep} this takes is not exact in half precision: if the model is stored so, "
            "the tensors that take it are stored in float32. --round-to power-of-two avoids it."
        )
    return note


def _padding(dense_states: int, keep: int) -> str:
    padded = 1 << keep.bit_length()
    gain = "gains nothing there" if padded >= dense_states else f"costs as much as {padded} there"
    return (
        f"{keep} states is not a power of two: the Triton decode kernels of mamba_ssm and vLLM pad it to {padded}, "
        f"so it {gain}; transformers, our CPU scan and mamba_ssm's prefill do gain. "
        "--round-to power-of-two avoids it."
    )


class Entries(Method):
    """Single entries of A_log, or N of every M of them."""

    name = "entries"
    leaves = ("entries",)
    place = 20
    pattern = Pattern(
        UNSTRUCTURED,
        "entries",
        "`unstructured` (single entries), and `2:4`, `4:8` or any other N:M (of every M entries N stay)",
        "ghost",
        takes_scope=True,
    )

    def asked_for(self, plan: Plan) -> bool:
        """By the pattern or an N:M, where A_log is in scope."""
        config = plan.config
        return config.prunes_a_log and (UNSTRUCTURED in config.parts or config.nm is not None)

    def needs_text(self, plan: Plan) -> bool:
        """As the score says."""
        return looks_at_text(plan.config.pattern, plan.config.first_score)

    def check(self, plan: Plan) -> None:
        """Not every score goes with every family, and groups of N:M must be whole."""
        refuse_unfit(plan, plan.config.pattern)
        if plan.config.nm:
            # groups lie along the states of a channel; a Mamba-2 has one number a head: there, neighbouring heads
            sizes = plan.sizes
            check_groups(sizes.d_state if sizes.heads is None else sizes.heads // sizes.groups, plan.config.nm)

    def shares_samples(self, plan: Plan) -> bool:
        """Scores are sums."""
        return True

    def prune(self, job: Job) -> None:
        """Every layer."""
        from ssmc.compressor.methods.states.prune import prune_entries

        prune_entries(job)

    def notes(self, outcome: Outcome) -> list[str]:
        """That nothing gets faster."""
        if outcome.plan.config.pruned_entry == "forget":
            return [
                "Pruned entries of A_log are stored as 12, so that exp(dt A) is 0: in every runtime such a state has "
                "no memory and passes on what it reads at the same step. It costs the same, so nothing gets smaller "
                "or faster. It is there to compare with the paper; --pattern column removes states for real."
            ]
        return [
            "Entries of A_log that are 0 stand for A = -1: the state still decays and costs the same, so this makes "
            "nothing smaller or faster. It is there to compare with; --pattern column removes states for real."
        ]


register_method(States())
register_method(Entries())
