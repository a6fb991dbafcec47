"""What the hybrids of transformers have in common: blocks of several kinds, of which some hold a Mamba mixer.

A block takes more than its input: masks, positions, rotary embeddings. The model itself computes them, so they are
recorded once, block by block, from a run of the stock model on a sample, and handed to the block again whenever it runs
alone. They depend on the length of the samples, not on their tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.experts import EXPERT, Mixture
from ssmc.runtime.models.architectures.layouts.blocks import without_blocks
from ssmc.runtime.models.architectures.layouts.experts import join_experts, split_experts
from ssmc.runtime.models.architectures.plan import STATE, Cut
from ssmc.runtime.models.architectures.units import Part, Writer, find_module, head_dim_of

_OF_EXPERTS = "experts.down_proj"  # the last map of all experts of a block, one tensor
_ARGUMENTS = "_ssmc_arguments"  # attribute of a block that holds what it was called with
_ATTENTION = ("attention", "full_attention")  # what configurations call such blocks


class Hybrid:
    """Layout of the hybrids; it comes before the class that knows the mixer."""

    embedding = "model.embed_tokens.weight"
    mixer_name: str  # attribute of a block
    norm_name = "input_layernorm"  # attribute of a block: the norm before the mixer
    final_norm: str  # attribute of the model
    experts: Sequence[tuple[str, str]] = ()  # how experts are stored and what the model has, see `join_experts`
    units: Sequence[Part] = ()  # modules beside the mixer whose units can go
    writers: Sequence[Writer] = ()  # what of a block adds to the residual stream, in the order of the stages
    middle: str = ""  # attribute of a block: the norm that reads what the first stage put out, where there is another

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The residual blocks of all kinds in the order they run."""
        return model.model.layers

    def mixer(self, block: nn.Module) -> nn.Module | None:
        """The state-space mixer inside a block; None in one of another kind."""
        return getattr(block, self.mixer_name, None)

    def mixer_prefix(self, layer: int) -> str:
        """How the names of a mixer's tensors start in the model's state dict."""
        return f"model.layers.{layer}.{self.mixer_name}."

    def block_prefix(self, layer: int) -> str:
        """How the names of a block's tensors start in the model's state dict."""
        return f"model.layers.{layer}."

    def linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """The linear maps of a block beside its mixer, by name within the block: those of attention and MLP."""
        mine = f"{self.mixer_name}." if self.mixer(block) is not None else None
        return {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and not (mine and name.startswith(mine))
        }

    def writers_in(self, block: nn.Module) -> list[Writer]:
        """The linear maps of a block that add to the residual stream, in the order of their stages."""
        return [writer for writer in self.writers if isinstance(find_module(block, writer.name), nn.Linear)]

    def mixtures_in(self, block: nn.Module) -> list[tuple[Mixture, Writer]]:
        """The mixtures of experts in a block, each with how it adds to the residual stream."""
        found = [part for part in self.units if part.kind == EXPERT and part.inside(block) is not None]
        named = {writer.name: writer for writer in self.writers}
        return [(cast(Mixture, part), named[f"{part.name}.{part.reader}"]) for part in found]

    def reading(self, block: nn.Module, stage: int) -> list[str]:
        """The weights of a block that read what the norm of a stage puts out, by name within it."""
        names = [f"{self.mixer_name}.in_proj.weight"] if stage == 0 and self.mixer(block) is not None else []
        for part in self.units:
            late = any(writer.stage for writer in self.writers if writer.name == f"{part.name}.{part.reader}")
            module = part.inside(block)
            if late == bool(stage) and module is not None:
                names += [f"{part.name}.{name}" for name in part.reading(module)]
        own = dict(block.named_parameters())
        return [name for name in dict.fromkeys(names) if name in own]

    def norms_in(self, block: nn.Module) -> list[str]:
        """The norms of a block that read the residual stream, one for each stage, by name within it."""
        return [name for name in (self.norm_name, self.middle) if name and find_module(block, name) is not None]

    @property
    def last_norm(self) -> str:
        """The norm before the head, by its name in the model."""
        return f"model.{self.final_norm}"

    def with_d_model(self, config: Any, count: int) -> Any:
        """As that of the mixers' own; what an attention head has is a fixed number from now on."""
        before = copy.deepcopy(config)
        before.head_dim = head_dim_of(config)
        return super().with_d_model(before, count)  # type: ignore[misc]

    def resized(self, config: Any, *, n_layer: int, d_inner: int, d_state: int) -> Any:
        """A configuration with another number of states; layers and widths of a hybrid stay.

        Raises:
            ValueError: other layers or another d_inner.
        """
        sizes = self.dimensions(config)
        if (n_layer, d_inner) != (sizes.n_layer, sizes.d_inner):
            raise ValueError("a hybrid of other layers or another d_inner cannot be loaded by transformers")
        return self.with_size(config, STATE, d_state * sizes.groups)

    def embed(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads, (B, L, d_model), of (B, L) tokens."""
        return model.get_input_embeddings()(tokens) * getattr(model.config, "embedding_multiplier", 1.0)

    def from_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the model's names from those by the names they are stored under."""
        for stored, joined in self.experts:
            tensors = join_experts(tensors, stored, joined)
        return tensors

    def to_stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the names they are stored under from those by the model's names."""
        for stored, joined in self.experts:
            tensors = split_experts(tensors, stored, joined)
        return tensors

    def uses(self, name: str, config: Any) -> float:
        """How often a token goes through a matrix of the model, on average: through some of the experts only."""
        return config.num_experts_per_tok / config.num_local_experts if ".experts." in name else 1.0

    def layers_with_attention(self, config: Any) -> Sequence[int]:
        """The numbers of the layers that keep keys and values."""
        return [layer for layer, kind in enumerate(config.layers_block_type) if kind in _ATTENTION]

    def kept_per_token(self, config: Any) -> int:
        """Numbers that attention keeps of every token, keys and values of all layers."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * len(self.layers_with_attention(config)) * heads * width

    def head(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from the last block's output (B, L, d_model)."""
        return self.logits(model, getattr(model.model, self.final_norm)(hidden))

    def logits(self, model: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, vocab) from what the last norm puts out (B, L, d_model)."""
        scale = getattr(model.config, "lm_head_multiplier", 1.0) / getattr(model.config, "logits_scaling", 1.0)
        return model.lm_head(normed.to(model.lm_head.weight.dtype)).float() * scale

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the mixer of `block` reads when the block reads `hidden`, both (B, L, d_model)."""
        norm = getattr(block, self.norm_name)
        return norm(hidden.to(norm.weight.dtype))

    def record_arguments(self, model: nn.Module, tokens: torch.Tensor) -> None:
        """Run the model on tokens (1, L) and keep what it hands to each block, for `run` on samples of that length."""

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = dict(inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments)
            given = bound.pop("kwargs", {}) | bound
            setattr(block, _ARGUMENTS, {k: v for k, v in given.items() if k not in ("self", "hidden_states")})

        blocks = self.blocks(model)
        hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        try:
            with torch.no_grad():
                where = model.get_input_embeddings().weight.device
                model.base_model(tokens if where.type == "meta" else tokens.to(where), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def recorded(self, block: nn.Module, device: torch.device) -> dict[str, Any]:
        """What a block was called with beside its input, on that device."""
        return {name: _on(value, device) for name, value in getattr(block, _ARGUMENTS).items()}

    def enter(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as it is: nothing is computed before a block."""
        return hidden

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden`, (B, L, d_model) both, with the arguments that were recorded."""
        output = block(hidden, **self.recorded(block, hidden.device))
        return output[0] if isinstance(output, tuple) else output

    def mixed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` and what the mixer alone puts out for it, (B, L, d_model)."""
        mixer = self.mixer(block)
        _, y = self.scanned(block, hidden)
        return hidden + mixer.out_proj(y.to(mixer.out_proj.weight.dtype))

    def output(self, block: nn.Module, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a block puts out for `hidden`, (B, L, d_model): more than what out_proj makes of `y` (B, L, D)."""
        return self.run(block, hidden)

    def remove_block(self, block: nn.Module) -> None:
        """Make a block hand on what it reads: all maps that add to the residual stream become zero."""
        with torch.no_grad():
            for parameter in self._adding(block):
                parameter.zero_()

    def is_removed(self, block: nn.Module) -> bool:
        """Whether a block hands on what it reads: all maps that add to the residual stream are zero."""
        return not any(bool(parameter.any()) for parameter in self._adding(block))

    def cut_blocks(
        self, tensors: Mapping[str, torch.Tensor], config: Any, removed: Sequence[int]
    ) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
        """Remove whole blocks from a state dict and its configuration; those that stay are numbered anew."""
        kept = [layer for layer in range(config.num_hidden_layers) if layer not in removed]
        out, cuts = without_blocks(tensors, self.block_prefix, kept)
        smaller = copy.deepcopy(config)
        self.keep_layers(smaller, kept)
        return out, smaller, cuts

    def keep_layers(self, config: Any, kept: Sequence[int]) -> None:
        """Tell a configuration, in place, that these layers stay, each of its kind."""
        config.num_hidden_layers = len(kept)

    def _adding(self, block: nn.Module) -> list[nn.Parameter]:
        """The parameters of what adds to the residual stream: linear maps, and those of experts."""
        maps = [find_module(block, writer.name) for writer in self.writers_in(block)]
        found = [parameter for linear in maps if linear is not None for parameter in linear.parameters()]
        return found + [p for name, p in block.named_parameters() if name.endswith(_OF_EXPERTS)]


def _on(value: Any, device: torch.device) -> Any:
    """A recorded argument where the block is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(_on(v, device) for v in value) if isinstance(value, tuple) else value
