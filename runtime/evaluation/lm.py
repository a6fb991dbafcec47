"""A model in memory as lm-eval sees one: recurrent, so that padding on the right changes nothing before it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from ssmc.runtime.collectives import Dealt
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from ssmc.runtime.measure.losses import IGNORED, best_batch, token_losses
from ssmc.runtime.models.generation import Generation, LoadedSession, Sampling
from ssmc.runtime.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from ssmc.runtime.measure.losses import LanguageModel

CPU = torch.device("cpu")
MAX_LENGTH = 2048
"""Tokens a request may have; longer ones lose their start. A Mamba has no limit; this is the one lm-eval gives it."""


class RecurrentLM(TemplateLM):
    """lm-eval's interface to a causal recurrent language model, of transformers or an ONNX export.

    Texts are cut into context and continuation by lm-eval itself (`TemplateLM._encode_pair`). Nothing is ever padded on
    the left: log-likelihoods are padded on the right, where a causal model's earlier outputs cannot see it, and
    generation runs one prompt at a time. Several processes that are joined share the batches, and all have all answers.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        batch_size: int = 8,
        name: str = "model",
        progress: Progress = NO_PROGRESS,
    ):
        """Wrap a model.

        Args:
            model: a causal language model of transformers in eval mode, or the session of an ONNX export.
            tokenizer: its tokenizer.
            batch_size: sequences at once.
            name: what progress calls the model.
            progress: told after every batch.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = best_batch(model, batch_size)
        self._name = name
        self._progress = progress

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_output_embeddings().weight.device if isinstance(self.model, nn.Module) else CPU

    @property
    def max_length(self) -> int:
        """Tokens a request may have."""
        return MAX_LENGTH

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, and which therefore stands before one that has no context."""
        config = getattr(self.model, "config", None)
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, getattr(config, "eos_token_id", None)):
            if isinstance(token, int):
                return token
        raise CheckpointError(
            "The tokenizer has no end-of-text token, which tasks need. Name another with --tokenizer."
        )

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name."""
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, with the special tokens the tokenizer adds unless told otherwise."""
        if add_special_tokens is None:  # do not add what the text already starts with
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding would give it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each whole text in nats, long ones in windows as lm-eval cuts them."""
        pieces, counts = [], []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            pieces += [((request.args[0], ""), *pair) for pair in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(pieces))
        return [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continue each prompt up to a stop sequence, one at a time; torch's models by transformers' own generation."""
        texts, dealt = [], Dealt(len(requests))
        for piece in dealt.own:
            self._progress(f"generation of {self._name}", piece.start, len(requests))
            texts += [self._generate(*request.args) for request in requests[piece]]
        return dealt.values(texts)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, continuation), _, tokens in requests:
            if not tokens:
                raise CalibrationError(
                    f"A document of the tasks asks for the probability of a text without tokens ({continuation!r}). "
                    "Correct the document or leave the task out."
                )
        sequences = [(context + target)[-(self.max_length + 1) :] for _, context, target in requests]
        order = sorted(range(len(requests)), key=lambda i: -len(sequences[i]))  # the longest first, so memory shows now
        dealt = Dealt(len(order), self.batch_size)
        found: list[tuple[float, bool]] = []
        for piece in dealt.own:
            batch = order[piece]
            found += self._score([sequences[i] for i in batch], [len(requests[i][2]) for i in batch])
            self._progress(f"tasks of {self._name}", piece.stop, len(order))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, (likelihood, greedy) in zip(order, dealt.values(found), strict=True):
            scores[index] = (likelihood, greedy)
        return scores

    def _score(self, sequences: list[list[int]], targets: list[int]) -> list[tuple[float, bool]]:
        """Log-probability of the last `targets[i]` tokens of each sequence, and whether each was the likeliest."""
        inputs = nn.utils.rnn.pad_sequence(  # zeros on the right
            [torch.tensor(sequence[:-1]) for sequence in sequences], batch_first=True
        )
        wanted = torch.full_like(inputs, IGNORED)
        ends = [len(sequence) - 1 for sequence in sequences]
        for row, (sequence, end, count) in enumerate(zip(sequences, ends, targets, strict=True)):
            wanted[row, end - count : end] = torch.tensor(sequence[-count:])
        nll, likeliest = token_losses(self.model, inputs, wanted)
        if not torch.isfinite(nll).all():
            raise CheckpointError(
                f"The loss of {self._name} is not a finite number. Its weights or its dtype overflow: try float32, or "
                "check the checkpoint."
            )
        rows = zip(nll, likeliest, ends, targets, strict=True)
        return [
            (-math.fsum(losses[end - count : end].tolist()), bool(same[end - count : end].all()))
            for losses, same, end, count in rows
        ]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        options = dict(normalize_gen_kwargs(options))
        until = [stop for stop in options.pop("until", []) if stop]
        longest = options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options.pop("temperature", None)
        context = self.tok_encode(prompt)[-max(1, self.max_length - longest) :] or [self.prefix_token_id]
        if isinstance(self.model, nn.Module):
            return self._generate_by_transformers(context, until, longest, options)
        loaded = LoadedSession(self.model, self.tokenizer, (self.eot_token_id,), self._name)
        return "".join(Generation(loaded, context, _sampling(options), longest, until))

    @torch.inference_mode()
    def _generate_by_transformers(
        self, context: list[int], until: list[str], longest: int, options: dict[str, Any]
    ) -> str:
        inputs = torch.tensor([context], device=self.device)
        output = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=longest,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            **({"stop_strings": until, "tokenizer": self.tokenizer} if until else {}),
            **options,
        )
        text = self.tokenizer.decode(output[0, len(context) :], skip_special_tokens=True)
        for stop in until:
            text = text.split(stop)[0]
        return text


def _sampling(options: dict[str, Any]) -> Sampling:
    """How a task wants tokens to be chosen.

    Raises:
        UsageError: in a way that only transformers' generation knows.
    """
    known = {"do_sample", "temperature", "top_k", "top_p"}
    if unknown := sorted(set(options) - known):
        raise UsageError(
            f"The task generates with {', '.join(unknown)}, which exports to ONNX cannot. Evaluate the model in torch."
        )
    if not options.get("do_sample"):
        return Sampling()
    temperature = options.get("temperature", 1.0)
    return Sampling(temperature, options.get("top_k"), options.get("top_p"))
