"""Sessions and generation with torch: against stock transformers, numpy formulas and plain decoding."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.models.generation import (
    LoadedSession,
    Sampling,
    TorchSession,
    generate,
    generate_batch,
    open_session,
    stream_tokens,
)
from ssmc.runtime.models.generation.detokenise import StopFilter, TextStream
from ssmc.runtime.models.generation.session import pad_left
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.commandline import PROMPTS
from tests.support.models import random_model, random_tokens


@pytest.fixture(scope="module")
def stock():
    """The embedded model as transformers itself runs it."""
    return use_stock_scan(open_session("tiny", device="cpu").session.model)


def session_of(model) -> TorchSession:
    return TorchSession(use_fast_scan(copy.deepcopy(model)))


# --- sessions ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pieces", [(9,), (1, 8), (5, 4), (2, 1, 6)])
def test_prefill_in_pieces_and_steps_equal_one_stock_forward(batch, pieces):
    model = random_model()
    tokens = random_tokens((batch, 25))
    wanted = model(tokens).logits  # (B, L, V)
    session, read = session_of(model), 0
    for piece in pieces:
        got = session.prefill(tokens[:, read : read + piece])
        read += piece
        torch.testing.assert_close(got, wanted[:, read - 1], rtol=1e-4, atol=1e-4)
    for position in range(read, 25):
        got = session.step(tokens[:, position])
        torch.testing.assert_close(got, wanted[:, position], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reset_forgets():
    session = session_of(random_model())
    tokens = random_tokens((2, 6))
    first = session.prefill(tokens).clone()
    assert not torch.allclose(session.prefill(tokens), first)
    session.reset()
    assert torch.equal(session.prefill(tokens), first)
    session.reset()
    session.prefill(tokens[:1])  # another batch size


def test_prompts_of_unequal_length_are_padded_without_a_trace():
    model, prompts = random_model(), [[5, 8, 13, 21, 34], [3], [1, 2]]
    session = session_of(model)
    tokens, mask = pad_left(prompts)
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]
    together = [session.prefill(tokens, mask), session.step([7, 7, 9])]
    for row, (prompt, following) in enumerate(zip(prompts, [7, 7, 9], strict=True)):
        alone = session_of(model)
        for got, wanted in zip(together, [alone.prefill([prompt]), alone.step([following])], strict=True):
            torch.testing.assert_close(got[row], wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda s: s.prefill([[]]), "no tokens"),
        (lambda s: s.prefill([[1, 64]]), "token id 64"),
        (lambda s: s.prefill([[1, -1]]), "token id -1"),
        (lambda s: (s.prefill([[1]]), s.prefill([[1], [2]])), "holds 1 sequences"),
        (lambda s: (s.prefill([[1]]), s.step([1, 2])), "holds 1 sequences"),
        (lambda s: s.prefill([[1, 2]], torch.tensor([[1, 0]])), "left"),
        (lambda s: s.prefill([[1, 2, 3]], torch.tensor([[1, 0, 1]])), "left"),
        (lambda s: (s.prefill([[1]]), s.prefill([[1, 2]], torch.tensor([[0, 1]]))), "left"),
    ],
)
def test_what_a_session_refuses(call, named):
    with pytest.raises(UsageError, match=named):
        call(session_of(random_model()))


def test_padding_is_refused_where_a_bias_would_leave_a_trace():
    with pytest.raises(UsageError, match="bias"):
        session_of(random_model(use_bias=True)).prefill(*pad_left([[1, 2], [3]]))


# --- greedy generation ------------------------------------------------------------------------------------------------


def stock_greedy(model, ids, count):
    ids = torch.tensor([ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers_generate(loaded, stock, prompt):
    writing = generate(loaded, prompt, max_new_tokens=40)
    text = "".join(writing)
    wanted = stock_greedy(stock, writing.prompt_tokens, 40)
    assert writing.tokens == wanted
    assert text == writing.text == loaded.tokenizer.decode(wanted)
    assert writing.ended == "length"


def test_a_batch_of_unequal_prompts_writes_what_each_alone_does(loaded):
    alone = ["".join(generate(loaded, prompt, max_new_tokens=12)) for prompt in PROMPTS]
    assert generate_batch(loaded, PROMPTS, max_new_tokens=12) == alone
    assert len(set(alone)) == 3


def test_a_stop_token_ends_a_sequence_and_the_others_go_on(loaded):
    prompts = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    free = list(stream_tokens(loaded.session, prompts, max_new_tokens=10))
    stop = free[4][1]  # what the second writes fifth
    ends = [next((i for i, row in enumerate(free) if row[column] == stop), 10) for column in range(3)]
    rows = list(stream_tokens(loaded.session, prompts, max_new_tokens=10, stop_tokens=[stop]))
    assert len(rows) == max(ends)
    for column, end in enumerate(ends):
        wanted = [row[column] for row in free][:end] + [None] * (len(rows) - end)
        assert [row[column] for row in rows] == wanted
    assert ends[1] < max(ends)


def test_the_models_own_end_of_text_ends_it(loaded):
    session = session_of(loaded.session.model)
    with torch.no_grad():
        session.model.backbone.norm_f.weight.zero_()  # every logit is 0, the likeliest token is the first: end of text
    writing = generate(LoadedSession(session, loaded.tokenizer, loaded.stop_tokens, "x"), "Once")
    assert loaded.stop_tokens == (0,)
    assert ("".join(writing), writing.tokens, writing.ended) == ("", [], "end")


def test_a_stop_string_ends_before_itself(loaded):
    whole = "".join(generate(loaded, PROMPTS[0], max_new_tokens=40))
    stop = whole[30:41]  # across the borders of tokens
    writing = generate(loaded, PROMPTS[0], max_new_tokens=40, stop=["never", stop])
    assert "".join(writing) == writing.text == whole[: whole.index(stop)]
    assert writing.ended == "stop"
    assert generate_batch(loaded, PROMPTS[:1], max_new_tokens=40, stop=[stop]) == [whole[: whole.index(stop)]]


def test_text_comes_piece_by_piece_and_is_computed_only_when_asked_for(loaded):
    writing = generate(loaded, PROMPTS[0], max_new_tokens=200)
    pieces = iter(writing)
    first = next(pieces)
    assert writing.text == first
    assert len(writing.tokens) == 1
    assert writing.ended is None
    assert writing.prefill_speed > 0
    assert writing.decode_speed == 0
    next(pieces)
    assert writing.decode_speed > 0


# --- sampling ---------------------------------------------------------------------------------------------------------


def numpy_distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities by the definitions: softmax(logits / T), the k largest, the fewest that reach p, renormalised."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k is not None:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p is not None:
        kept = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        p[order[kept:]] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.7},
        {"temperature": 0.5, "top_k": 1},
        {"top_p": 1e-9},
    ],
)
def test_draws_follow_the_distribution_of_the_formula(options):
    logits = 2 * np.random.default_rng(1).standard_normal(12)
    wanted = numpy_distribution(logits.copy(), **options)
    draws = 20_000
    rows = torch.tensor(logits, dtype=torch.float32).expand(draws, -1)
    counts = torch.bincount(Sampling(**options, seed=5).chooser(draws)(rows), minlength=12).numpy()
    assert counts[wanted == 0].sum() == 0
    spread = np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(counts / draws - wanted) <= 4 * spread + 1e-12).all()


def test_logits_that_are_no_numbers_give_tokens_of_the_vocabulary():
    tokens = Sampling(temperature=1.0).chooser(3)(torch.full((3, 12), float("nan")))
    assert ((tokens >= 0) & (tokens < 12)).all()


def test_the_same_seed_gives_the_same_text(loaded):
    def text(seed):
        return "".join(generate(loaded, PROMPTS[0], temperature=1.0, top_p=0.95, seed=seed, max_new_tokens=12))

    torch.manual_seed(1)
    first = text(3)
    torch.manual_seed(2)  # the global generator has no say
    state = torch.get_rng_state()
    assert text(3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len({text(seed) for seed in range(3, 8)}) == 5
    together = generate_batch(loaded, [PROMPTS[0]] * 3, temperature=1.0, top_p=0.95, seed=3, max_new_tokens=12)
    assert together == [text(3), text(4), text(5)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(options, named):
    with pytest.raises(UsageError, match=named):
        Sampling(**options)


def test_greedy_is_what_nothing_and_temperature_zero_mean():
    assert Sampling().greedy
    assert Sampling(temperature=0, top_k=5).greedy
    assert not Sampling(top_k=5).greedy
    assert not Sampling(temperature=1.0).greedy


# --- from tokens to text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [" naïve café, 中文字 and 🦜🐍!", "  two  spaces \n\n\ttab ", "日本語", "é"])
def test_text_of_single_tokens_is_the_text(text):
    tokenizer = load_tokenizer(TINY_DIRECTORY)
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("Once")["input_ids"])
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > len(pieces) // 5


def test_half_a_character_at_the_end_is_shown_as_one_that_is_missing():
    tokenizer = load_tokenizer(TINY_DIRECTORY)
    ids = tokenizer("a🦜")["input_ids"]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids[:-1]) == "a"
    assert set(stream.end()) == {"\ufffd"}
    assert stream.end() == ""


def test_a_tokenizer_that_marks_word_starts_keeps_the_space_after_the_prompt():
    """As SentencePiece's do: decoding "▁world" alone would drop the space."""
    words = ["▁hello", "▁world", "s"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="s"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=backend), [0])
    assert [stream.push(token) for token in (1, 2, 1)] == [" world", "s", " world"]


def test_a_tokenizer_that_cannot_stream_is_refused():
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextStream(object())


def test_stop_strings_end_the_text_however_it_is_cut():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab", k=draw.randint(0, 20)))
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))]
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stop_filter, given, certain = StopFilter(stops), "", True
        for piece in pieces:
            given += stop_filter.push(piece)
            certain &= text.startswith(given)
        found = [text.index(stop) for stop in stops if stop in text]
        # the first stop string to be complete ends the text; another that began earlier may still have been open
        assert stop_filter.stopped == bool(found)
        given += stop_filter.end()
        assert text.startswith(given)
        assert not any(stop in given for stop in stops)
        assert len(given) >= min(found, default=len(text))


# --- the command ------------------------------------------------------------------------------------------------------
