"""A graph by mobius-onnx, for `onnx_hybrids`: runs in an environment of its own, without ssmc.

    python benchmarks/speed/mobius_graph.py MODEL OUT

mobius-onnx 0.1 knows the kinds of layers by the words of transformers before 5.20, so it is told those.
"""

from __future__ import annotations

import sys

import mobius
import transformers

WORDS = {"linear_attention": "mamba", "full_attention": "attention"}


def main(model: str, out: str) -> None:
    read = transformers.AutoConfig.from_pretrained

    def in_old_words(*args, **options):
        config = read(*args, **options)
        if kinds := getattr(config, "layers_block_type", None):
            object.__setattr__(config, "layers_block_type", [WORDS.get(kind, kind) for kind in kinds])
        return config

    transformers.AutoConfig.from_pretrained = in_old_words
    mobius.build(model, dtype="f32", execution_provider="cpu").save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
