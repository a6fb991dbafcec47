"""What ssmc must know about a model family, in one small interface; everything else is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ssmc.runtime.scan.inputs import ScanInputs, SsdInputs


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model in the field's terms."""

    n_layer: int
    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    vocab_size: int  # rows of the embedding, padding rows included

    @property
    def groups(self) -> int:
        """Groups of channels with a B and C of their own, each with `d_state` states."""
        return 1

    @property
    def heads(self) -> int | None:
        """Heads of channels that share a decay rate; None where every channel has its own, for every state."""
        return None

    def as_dict(self) -> dict[str, int]:
        """The sizes by name, for manifests and reports."""
        return asdict(self)

    @property
    def mixers(self) -> int:
        """Layers with a state-space mixer: all of them, but in a hybrid."""
        return self.n_layer

    def state_bytes(self, itemsize: int = 4) -> int:
        """Bytes of recurrent state one sequence occupies: the SSM state and the convolution's window, all layers."""
        return self.mixers * self.d_inner * (self.d_state + self.d_conv) * itemsize


@dataclass(frozen=True)
class HybridDimensions(Dimensions):
    """The sizes of a model in which some layers only have a state-space mixer."""

    mamba_layers: int

    @property
    def mixers(self) -> int:
        """Layers with a state-space mixer."""
        return self.mamba_layers


@dataclass(frozen=True)
class Cut:
    """One tensor that got smaller, for the list of what an export removed."""

    name: str  # "backbone.layers.0.mixer.x_proj"
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Readers:
    """What makes C = silu(conv1d(in_proj(x))) of one group of a Mamba-2: views into the mixer's parameters."""

    weight: torch.Tensor  # (N, d_model) of in_proj
    in_bias: torch.Tensor | None  # (N,)
    taps: torch.Tensor  # (N, d_conv) of conv1d
    bias: torch.Tensor | None  # (N,)


class Architecture(Protocol):
    """One model family: where its mixers are, what a scan of it reads, and how its state dimension is cut.

    Implementations live in files named after their transformers `model_type` and are listed in
    `families/__init__.py`.
    """

    model_type: str
    has_gpu_gradients: bool  # so has the scan's backward
    has_gpu_sums: bool  # a kernel for a GPU sums over the states without writing them
    has_gpu_scan: bool  # kernels for a GPU: then `scan_inputs` takes `fuse`, `scan` takes `in_place`
    has_normed_readers: bool  # B and C pass a norm over the states: then there are `before_norm`, `scale_readers`
    is_hybrid: bool  # blocks differ, have parts beside a mixer, and stay where they are
    shares_blocks: bool  # something that layers share is to `enter` what they read before they run
    mixer_name: str  # attribute of a block
    embedding: str  # name of the embedding's weight, which a tied head shares

    def dimensions(self, config: Any) -> Dimensions:
        """Read the sizes out of a transformers configuration."""

    def resized(self, config: Any, *, n_layer: int, d_inner: int, d_state: int) -> Any:
        """A configuration of the same family with other sizes, as a model cut to them would have."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The residual blocks in the order they run; each takes and returns (B, L, d_model), see `run`."""

    def embed(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads, (B, L, d_model), of (B, L) tokens."""

    def record_arguments(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """Find out, on tokens (1, L), what else the blocks of a hybrid are called with; before `run`, `output`."""

    def enter(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block reads with all that is computed before it runs; where `shares_blocks`."""

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block makes of `hidden`, (B, L, d_model) both, L that of `record_arguments`."""

    def mixed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` and what the mixer alone puts out for it, (B, L, d_model)."""

    def output(self, block: nn.Module, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a block makes of `hidden`, (B, L, d_model), when what out_proj reads is known, (B, L, D)."""

    def head(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from the last block's output (B, L, d_model)."""

    def logits(self, model: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from what the last norm puts out (B, L, d_model)."""

    def uses(self, name: str, config: Any) -> float:
        """How often a token goes through a matrix of the model, on average."""

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""

    def mixer(self, block: nn.Module) -> nn.Module | None:
        """The state-space mixer inside a block; None in one of another kind."""

    def mixer_prefix(self, layer: int) -> str:
        """How the names of a mixer's tensors start in the model's state dict."""

    def block_prefix(self, layer: int) -> str:
        """How the names of a block's tensors start in the model's state dict."""

    def linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """The linear maps of a block beside its mixer, by name within the block; none but in a hybrid."""

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the mixer of `block` reads when the block reads `hidden`, both (B, L, d_model)."""

    def read_by_in_proj(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the C rows of in_proj multiply when the block reads `hidden`, multipliers of their output included."""

    def expand(self, mixer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Apply in_proj: the convolution's input x, (B, L, ...), and what else `scan_inputs` needs of it."""

    def scan_inputs(
        self,
        mixer: nn.Module,
        x: torch.Tensor,
        z: Any,
        history: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> ScanInputs | SsdInputs:
        """Everything between in_proj and the scan; `history` holds the d_conv - 1 inputs before x.

        With `has_gpu_scan`, `fuse=True` uses kernels for a GPU and leaves softplus to the scan (`ScanInputs.dt_bias`).
        """

    def scan(
        self, mixer: nn.Module, inputs: Any, state: torch.Tensor | None = None, backend: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What out_proj reads, (B, L, D), from what `scan_inputs` returns, and the state after the last token."""

    def scan_groups(self, mixer: nn.Module, inputs: Any) -> list[ScanInputs]:
        """The scan as independent scans of Mamba-1's form, one for each group of channels with a B and C of its own."""

    def rates(self, mixer: nn.Module) -> list[torch.Tensor]:
        """A_log as each of these groups has it, (D, N)."""

    def gains(self, mixer: nn.Module, group: int, inputs: ScanInputs, states: torch.Tensor) -> torch.Tensor | None:
        """By what a group's read-outs are multiplied on their way to out_proj, (B, L, D), given its states h_t
        (B, L, N, D); None: by the gate silu(z)."""

    def readers(self, mixer: nn.Module, group: int) -> Readers:
        """What makes C of a group; only for families with heads."""

    def before_norm(self, mixer: nn.Module, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the norms of B and C read where the scan reads u (B, L, D), (B, L, N) each; with norms only."""

    def scale_readers(
        self, mixer: nn.Module, kept: Sequence[int], b: torch.Tensor, c: torch.Tensor, factor: float
    ) -> None:
        """Scale rows of B and C before their norms and undo it behind, and scale the read-out; with norms only."""

    def change_skip(self, mixer: nn.Module, group: int, change: torch.Tensor) -> None:
        """Add to the skip D of a group's heads, in place; only for families with heads."""

    def scanned(self, block: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the scan and out_proj read when the block reads `hidden`: u, and y with its gate, each (B, L, D)."""

    def module_weights(self, mixer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of the mixer's linear maps by name, (out, in), and of its conv1d, (D, K); views, not copies."""

    def module_inputs(self, block: nn.Module, hidden: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What each of these modules reads when the block reads `hidden`, and what the block returns."""

    def remove_block(self, block: nn.Module) -> None:
        """Make a block hand on what it reads, in place and without changing a shape."""

    def remove_ssm(self, block: nn.Module) -> None:
        """Silence the states of a block in place; the convolution, the skip D and the gate stay."""

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place, mixing the C rows of the kept ones first."""

    def is_masked(self, mixer: nn.Module, kept: Sequence[int]) -> bool:
        """Whether every state outside `kept` is silent, so that cutting it changes nothing."""

    def cut_states(
        self, tensors: Mapping[str, torch.Tensor], config: Any, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove all states but `kept[layer]` from a whole state dict and its configuration, which gets the most."""

    def mask_channels(self, mixer: nn.Module, kept: Sequence[int]) -> None:
        """Silence all channels but `kept` in place."""

    def narrowed(self, block: nn.Module, kept: Sequence[int]) -> nn.Module:
        """A copy of a block with some of its channels only: what the block computes when the others are silent."""

    def widen(self, block: nn.Module, narrow: nn.Module, kept: Sequence[int]) -> None:
        """Write the weights of a block made by `narrowed` back to their places in `block`, and silence the rest."""

    def are_channels_masked(self, mixer: nn.Module, kept: Sequence[int]) -> bool:
        """Whether every channel outside `kept` is silent, so that cutting it changes nothing."""

    def cut_channels(
        self, tensors: Mapping[str, torch.Tensor], config: Any, kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove all channels but `kept[layer]` from a whole state dict and its configuration, which gets the most."""

    def with_epsilons_of(self, model: nn.Module, config: Any) -> None:
        """Give norms over channels the epsilon they have, in effect, where `cut_channels` took silent ones out."""

    def is_removed(self, block: nn.Module) -> bool:
        """Whether a block hands on what it reads, so that cutting it changes nothing."""

    def cut_blocks(
        self, tensors: Mapping[str, torch.Tensor], config: Any, removed: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove whole blocks from a state dict and its configuration; those that stay are numbered anew."""
