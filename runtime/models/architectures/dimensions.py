"""The sizes of a model in the field's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ssmc.runtime.scan.rounding import channel_block


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

    @property
    def ssm_numbers(self) -> int:
        """Numbers of a sequence's SSM states, all layers."""
        return self.mixers * self.d_inner * self.d_state

    @property
    def window_numbers(self) -> int:
        """Numbers of the last inputs of the convolutions, all layers."""
        return self.mixers * self.d_inner * self.d_conv

    @property
    def scale_channels(self) -> int:
        """How many channels share a scale where states are kept in int8."""
        return channel_block(self.d_inner)

    def state_bytes(self, itemsize: int = 4) -> int:
        """Bytes of recurrent state one sequence occupies: the SSM state and the convolution's window, all layers."""
        return (self.ssm_numbers + self.window_numbers) * itemsize


@dataclass(frozen=True)
class HybridDimensions(Dimensions):
    """The sizes of a model in which some layers only have a state-space mixer."""

    mamba_layers: int

    @property
    def mixers(self) -> int:
        """Layers with a state-space mixer."""
        return self.mamba_layers


@dataclass(frozen=True)
class Mamba2Dimensions(Dimensions):
    """The sizes of a Mamba-2; `dt_rank` is the number of heads, as in_proj puts out one time step a head."""

    head_dim: int
    n_groups: int

    @property
    def groups(self) -> int:
        """Groups of heads, each with B and C of its own."""
        return self.n_groups

    @property
    def scale_channels(self) -> int:
        """Those of a head."""
        return self.head_dim

    @property
    def heads(self) -> int:
        """Heads of head_dim channels."""
        return self.dt_rank

    @property
    def window_numbers(self) -> int:
        """Numbers of the last inputs of the convolutions, which B and C pass too, all layers."""
        return self.mixers * (self.d_inner + 2 * self.n_groups * self.d_state) * self.d_conv


@dataclass(frozen=True)
class Mamba2HybridDimensions(Mamba2Dimensions):
    """The sizes of a hybrid whose mixers are Mamba-2's."""

    mamba_layers: int

    @property
    def mixers(self) -> int:
        """Layers with a state-space mixer."""
        return self.mamba_layers


def from_dict(record: Mapping[str, int]) -> Dimensions:
    """The sizes that `as_dict` wrote, of whichever kind they are.

    Raises:
        ValueError: they are of none.
    """
    kinds = [Dimensions]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if {item.name for item in fields(kind)} == record.keys():
            return kind(**record)
    raise ValueError(f"no family has the sizes {', '.join(record)}")
