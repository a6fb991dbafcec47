"""What ssmc must know about a model family, in five small pieces; everything else is the same for all of them.

`Layout` says where things are, `Flow` how a block runs, `Mixing` what a mixer computes, `Surgery` how a mixer and
`BlockSurgery` how a stack of blocks gets smaller. An `Architecture` is all five with `Capabilities`, which say what is
particular about it. Families with heads are `HeadReaders` too, those with norms on B and C `NormedReaders`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.capabilities import Capabilities, Otherwise
from ssmc.runtime.models.architectures.convolution import Window
from ssmc.runtime.models.architectures.dimensions import Dimensions
from ssmc.runtime.models.architectures.experts import Mixture
from ssmc.runtime.models.architectures.plan import Cut, Plan
from ssmc.runtime.models.architectures.units import Part, Writer
from ssmc.runtime.scan.inputs import ScanInputs, SsdInputs
from ssmc.runtime.scan.moments import Moments, SsdMoments
from ssmc.runtime.scan.rounding import StateFormat


@dataclass(frozen=True)
class Readers:
    """What makes C = silu(conv1d(in_proj(x))) of one group of a Mamba-2: views into the mixer's parameters."""

    weight: torch.Tensor  # (N, d_model) of in_proj
    in_bias: torch.Tensor | None  # (N,)
    taps: torch.Tensor  # (N, d_conv) of conv1d
    bias: torch.Tensor | None  # (N,)


class Layout(Protocol):
    """Where a model has its blocks and mixers, and what they are called."""

    mixer_name: str  # attribute of a block
    embedding: str  # name of the embedding's weight, which a tied head shares
    last_norm: str  # name in the model of the norm before the head
    units: Sequence[Part]  # modules beside the mixer whose units can go
    middle: str  # attribute of a block: the norm that reads what the first of two stages put out; empty: there is one

    def dimensions(self, config: Any) -> Dimensions:
        """Read the sizes out of a transformers configuration."""

    def resized(self, config: Any, *, n_layer: int, d_inner: int, d_state: int) -> Any:
        """A configuration of the same family with other sizes, as a model cut to them would have."""

    def with_d_model(self, config: Any, count: int) -> Any:
        """A configuration whose residual stream has `count` coordinates, and all else the same.

        Raises:
            ValueError: transformers has no such model.
        """

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The residual blocks in the order they run; each takes and returns (B, L, d_model), see `Flow.run`."""

    def mixer(self, block: nn.Module) -> nn.Module | None:
        """The state-space mixer inside a block; None in one of another kind."""

    def mixer_prefix(self, layer: int) -> str:
        """How the names of a mixer's tensors start in the model's state dict."""

    def block_prefix(self, layer: int) -> str:
        """How the names of a block's tensors start in the model's state dict."""

    def linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """The linear maps of a block beside its mixer, by name within the block; none but in a hybrid."""

    def writers_in(self, block: nn.Module) -> list[Writer]:
        """The linear maps of a block that add to the residual stream, in the order of their stages."""

    def mixtures_in(self, block: nn.Module) -> list[tuple[Mixture, Writer]]:
        """The mixtures of experts in a block, each with how it adds to the residual stream."""

    def reading(self, block: nn.Module, stage: int) -> list[str]:
        """The weights of a block that read what the norm of a stage puts out, by name within it."""

    def norms_in(self, block: nn.Module) -> list[str]:
        """The norms of a block that read the residual stream, one for each stage, by name within it."""

    def uses(self, name: str, config: Any) -> float:
        """How often a token goes through a matrix of the model, on average."""

    def kept_per_token(self, config: Any) -> int:
        """Numbers that attention keeps of every token, keys and values of all layers; 0 without attention."""

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""


class Flow(Protocol):
    """How hidden states go through a model, block by block."""

    def embed(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads, (B, L, d_model), of (B, L) tokens."""

    def record_arguments(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """Find out, on tokens (1, L), what else the blocks of a hybrid are called with; before `run`, `output`."""

    def enter(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block reads with all that is computed before it runs; `hidden` unless blocks are shared."""

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the mixer of `block` reads when the block reads `hidden`, both (B, L, d_model)."""

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden`, (B, L, d_model) both, L that of `record_arguments`."""

    def mixed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` and what the mixer alone puts out for it, (B, L, d_model)."""

    def output(self, block: nn.Module, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden`, (B, L, d_model), when what out_proj reads is known, (B, L, D)."""

    def head(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from the last block's output (B, L, d_model)."""

    def logits(self, model: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from what the last norm puts out (B, L, d_model)."""


class Mixing(Protocol):
    """What a mixer computes, step by step."""

    projections: tuple[str, ...]  # names of its linear maps

    def otherwise(self, config: Any) -> Sequence[Otherwise]:
        """What software silently computes otherwise of a model of this configuration."""

    def expand(self, mixer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Apply in_proj: the convolution's input x, (B, L, ...), and what else `scan_inputs` needs of it."""

    def convolve(
        self, mixer: nn.Module, x: torch.Tensor, history: torch.Tensor | Window | None = None, fused: bool = False
    ) -> torch.Tensor:
        """The activated convolution of x; `history` holds the d_conv - 1 inputs before it, see `convolution`."""

    def scan_inputs(
        self,
        mixer: nn.Module,
        x: torch.Tensor,
        z: Any,
        history: torch.Tensor | Window | None = None,
        attention_mask: torch.Tensor | None = None,
        fused: bool = False,
    ) -> ScanInputs | SsdInputs:
        """Everything between in_proj and the scan; `history` holds the d_conv - 1 inputs before x.

        With `fused`, where the family has a scan for a GPU and it will take the result, kernels for a GPU are used and
        bias and softplus of the time steps are left to the scan (`ScanInputs.dt_bias`). Other families ignore it.
        """

    def scan(
        self,
        mixer: nn.Module,
        inputs: Any,
        state: torch.Tensor | None = None,
        backend: str = "auto",
        in_place: bool = False,
        rounding: StateFormat | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), from what `scan_inputs` returns, and the state after the last token.

        With `in_place` a kernel for a GPU may overwrite the state of a single token with the one after it; with
        `rounding` the state is rounded after every token but the last.
        """

    def scanned(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the scan and out_proj read when the block reads `hidden`: u, and y with its gate, each (B, L, D)."""

    def scan_groups(self, mixer: nn.Module, inputs: Any) -> list[ScanInputs]:
        """The scan as independent scans of Mamba-1's form, one for each group of channels with a B and C of its own."""

    def rates(self, mixer: nn.Module) -> list[torch.Tensor]:
        """A_log as each of these groups has it, (D, N)."""

    def gains(self, mixer: nn.Module, group: int, inputs: ScanInputs, states: torch.Tensor) -> torch.Tensor | None:
        """By what a group's read-outs are multiplied on their way to out_proj, (B, L, D), given its states h_t
        (B, L, N, D); None: by the gate silu(z)."""

    def moments(
        self, mixer: nn.Module, inputs: Any, group: int, backend: str = "auto", weights: torch.Tensor | None = None
    ) -> Moments | SsdMoments:
        """Sums over a group's states, with `Capabilities.gpu_sums` and tensors that the kernels take; squared errors of
        the read-out at each token times its weight (B, L), if there are weights."""

    def module_weights(self, mixer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the mixer's linear maps by name, (out, in), and of its conv1d, (D, K); views, not copies."""

    def module_inputs(self, block: nn.Module, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What each of these modules reads when the block reads `hidden`, and what the block returns."""


class Surgery(Protocol):
    """How a mixer gets smaller along a dimension of `plan`: STATE (numbered over all groups), CHANNEL, ..."""

    plan: Plan

    def mask(self, mixer: nn.Module, dimension: str, kept: Sequence[int]) -> None:
        """Silence all of a dimension but `kept`, in place; shapes stay."""

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place, mixing the C rows of the kept ones first."""

    def remove_ssm(self, block: nn.Module) -> None:
        """Silence the states of a block in place; the convolution, the skip D and the gate stay."""

    def is_masked(self, mixer: nn.Module, dimension: str, kept: Sequence[int]) -> bool:
        """Whether everything outside `kept` is silent, so that cutting it changes nothing."""

    def cut(
        self, tensors: Mapping[str, torch.Tensor], config: Any, dimension: str, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove all but `kept[layer]` from a whole state dict and its configuration, which gets the most."""

    def narrow(self, block: nn.Module, dimension: str, kept: Sequence[int]) -> nn.Module:
        """A copy of a block with some of a dimension only: what the block computes when the others are silent."""

    def widen(self, block: nn.Module, narrow: nn.Module, dimension: str, kept: Sequence[int]) -> None:
        """Write the weights of a block made by `narrow` back to their places in `block`, and silence the rest."""

    def with_epsilons_of(self, model: nn.Module, config: Any) -> None:
        """Give a mixer's norms the epsilon they have, in effect, where `cut` took silent ones out."""


class BlockSurgery(Protocol):
    """How whole blocks go, where `Capabilities.fixed` does not say why they cannot."""

    def remove_block(self, block: nn.Module) -> None:
        """Make a block hand on what it reads, in place and without changing a shape."""

    def is_removed(self, block: nn.Module) -> bool:
        """Whether a block hands on what it reads, so that cutting it changes nothing."""

    def cut_blocks(
        self, tensors: Mapping[str, torch.Tensor], config: Any, removed: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove whole blocks from a state dict and its configuration; those that stay are numbered anew."""


class HeadReaders(Protocol):
    """What makes B and C in a family with heads, for repairs that fit them."""

    def readers(self, mixer: nn.Module, group: int) -> Readers:
        """What makes C of a group."""

    def read_by_in_proj(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the C rows of in_proj multiply when the block reads `hidden`, multipliers of their output included."""

    def change_skip(self, mixer: nn.Module, group: int, change: torch.Tensor) -> None:
        """Add to the skip D of a group's heads, in place."""


class NormedReaders(Protocol):
    """What makes B and C in a family with norms on them."""

    has_norm_weights: bool

    def before_norm(self, mixer: nn.Module, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the norms of B and C read where the scan reads u (B, L, D), (B, L, N) each."""

    def scale_readers(
        self, mixer: nn.Module, kept: Sequence[int], b: torch.Tensor, c: torch.Tensor, factor: float
    ) -> None:
        """Scale rows of B and C before their norms and undo it behind, and scale the read-out."""


class Architecture(Layout, Flow, Mixing, Surgery, BlockSurgery, Protocol):
    """One model family. Those of this package lie in `runtime/models/families`, a file each named as `model_type`."""

    model_type: str
    capabilities: Capabilities
