"""Stock transformers on CPU, end to end, with and without our scan: prefill, decode per token, and the scan alone.

    python -m benchmarks.speed.prefill  # Mamba-130M shapes, 512 tokens
    python -m benchmarks.speed.prefill --length 2048 --json prefill.json
    python -m benchmarks.speed.prefill --model-type mamba2  # the same of Mamba-2: N = 128, heads of 64 channels

The model has random weights and is built in memory; speed does not depend on their values. "stock" and "fast" are the
same model, before and after `use_fast_scan`, and take turns. Prefill computes the logits of every token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from benchmarks.speed.scan import contenders, layer_inputs, ssd_contenders, ssd_layer_inputs
from ssmc.runtime.measure.timing import interleave, paired_ratio
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan

SWITCH = {"stock": use_stock_scan, "fast": use_fast_scan}
CPU = torch.device("cpu")
HEAD_DIM = 64  # channels of a head of Mamba-2


def build(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": args.d_model, "num_hidden_layers": args.layers, "state_size": args.d_state}
    if args.model_type == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=50280, **sizes)).eval()
    heads = {"head_dim": HEAD_DIM, "num_heads": 2 * args.d_model // HEAD_DIM, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=50288, **sizes, **heads, tie_word_embeddings=True)).eval()


def both(model: PreTrainedModel, run: Callable[[], object], repeats: int) -> dict:
    """Time `run` with the stock and with the fast scan, in turns; switching is not timed."""
    ways = {name: lambda switch=switch: (switch(model), run()) for name, switch in SWITCH.items()}
    return interleave(ways, CPU, repeats, budget=600)


def check(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, object]:
    """The cache after the prompt, for decoding; fails unless both agree.

    The bound is wide because random weights are chaotic over 24 layers: in float32, stock itself is 3e-4 from float64.
    """
    wanted = use_stock_scan(model)(ids).logits
    got = use_fast_scan(model)(ids, use_cache=True)
    error = float((got.logits - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-3, f"fast differs from stock by {error:.1e} relative"
    print(f"largest difference of the logits, fast against stock: {error:.1e} of the largest logit\n")
    return got.cache_params


def scan_alone(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The scan of one layer, transformers' own and ours."""
    if args.model_type == "mamba":
        return contenders(layer_inputs(args.batch, args.length, 2 * args.d_model, args.d_state), reference=False)
    heads = 2 * args.d_model // HEAD_DIM
    return ssd_contenders(ssd_layer_inputs(args.batch, args.length, heads, HEAD_DIM, args.d_state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--model-type", choices=("mamba", "mamba2"), default="mamba")
    parser.add_argument("--d-state", type=int, help="default: 16, or 128 for Mamba-2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.d_state = args.d_state or {"mamba": 16, "mamba2": 128}[args.model_type]
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    now = print_conditions()
    model = build(args)
    ids = torch.randint(0, 50280, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = check(model, ids)
        # as generation does it: logits of the last token, states kept
        prefill = both(model, lambda: model(ids, use_cache=True, logits_to_keep=1), args.repeats)
        everything = both(model, lambda: model(ids), args.repeats)
        decode = both(model, lambda: model(ids[:, :1], cache_params=cache, use_cache=True), 4 * args.repeats)
        scan = interleave(scan_alone(args), CPU, args.repeats, budget=300)
    sizes = f"d_model {args.d_model}, {args.layers} layers, N = {args.d_state}, batch {args.batch}"
    print_timings(f"Prefill of {args.length} tokens, {sizes}", prefill, "stock")
    print_timings("The same with the logits of every token", everything, "stock")
    print_timings("Decode, per token", decode, "stock")
    print_timings("Scan alone, one layer", scan, "transformers")
    for name, part in (("stock", "transformers"), ("fast", "ours")):
        share = args.layers * scan[part].median / prefill[name].median
        print(f"the scan is about {share:.0%} of the {name} prefill")
    ratio = paired_ratio(prefill["stock"], prefill["fast"])
    print(f"end-to-end prefill: {ratio.median:.1f} times faster ({ratio.low:.1f} .. {ratio.high:.1f})")
    results = {"prefill": as_json(prefill, "stock"), "prefill_all_logits": as_json(everything, "stock")}
    results |= {"decode": as_json(decode, "stock")}
    results["scan"] = as_json(scan, "transformers")
    write_json(args.json, now, {k: v for k, v in vars(args).items() if k != "json"}, results)


if __name__ == "__main__":
    main()
