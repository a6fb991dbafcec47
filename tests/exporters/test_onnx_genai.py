"""`--format onnx --target genai`: a folder that onnxruntime-genai runs as it is, and our own session, too."""

import json

import numpy as np
import pytest
import torch

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.generation import open_session
from ssmc.runtime.models.tokenizers import load_tokenizer

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
LENGTH = 25


@pytest.fixture(scope="module", params=["tiny", "tiny-mamba2", "tiny-hybrid"])
def exported(request, tmp_path_factory):
    """A compressed model, its logits at every token, and its folder for genai."""
    out = tmp_path_factory.mktemp("artefact") / "out"
    compress(request.param, out=out, sparsity=0.5, score="random", repair=False)
    folder = export(out, format="onnx", target="genai").directory
    tokens = torch.randint(4096, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return out, folder, tokens, load_checkpoint(out, dtype=torch.float32).model(tokens, use_cache=False).logits[0]


@pytest.mark.parametrize("pieces", [[LENGTH], [1] * LENGTH, [10, 15]])
def test_genai_gives_the_logits_of_the_masked_model(exported, pieces):
    _, folder, tokens, wanted = exported
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=2 * LENGTH)
    generator, end = genai.Generator(model, params), 0
    for piece in pieces:
        generator.append_tokens(tokens[:, end : end + piece].numpy().astype(np.int32))
        end += piece
        np.testing.assert_allclose(generator.get_logits()[0, -1], wanted[end - 1], rtol=0, atol=1e-4)


def test_genai_writes_what_torch_writes(exported):
    out, folder, _, _ = exported
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=16)
    generator, reader = genai.Generator(model, params), genai.Tokenizer(model)
    generator.append_tokens(reader.encode("Once upon a time"))
    while not generator.is_done():
        generator.generate_next_token()
    ours = load_checkpoint(out, dtype=torch.float32)
    prompt = load_tokenizer(ours)("Once upon a time", return_tensors="pt")["input_ids"]
    text = ours.model.generate(prompt, max_length=16, do_sample=False)[0]
    assert list(generator.get_sequence(0)) == text.tolist()


def test_our_own_session_runs_it_too(exported):
    _, folder, tokens, wanted = exported
    session = open_session(folder).session
    session.prefill(tokens[:, :20])
    for end in range(20, LENGTH):
        torch.testing.assert_close(session.step(tokens[:, end])[0], wanted[end], rtol=0, atol=1e-4)
    config = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (config["eos_token_id"], config["vocab_size"]) == (0, 4096)
