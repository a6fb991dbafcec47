"""Stock transformers on CPU, end to end, with and without our scan: prefill, decode per token, and the scan alone.

    python benchmarks/prefill.py                         # Mamba-130M shapes, 512 tokens
    python benchmarks/prefill.py --length 2048 --json prefill.json

The model has random weights and is built in memory; speed does not depend on their values. "stock" and "fast" are the
same model, before and after `use_fast_scan`, and take turns. Prefill computes the logits of every token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from reporting import as_json, print_conditions, print_timings, write_json
from scan import contenders, layer_inputs
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils import logging

from ssmc.runtime.bench.timing import interleave, paired_ratio
from ssmc.runtime.fast import use_fast_scan, use_stock_scan

SWITCH = {"stock": use_stock_scan, "fast": use_fast_scan}
CPU = torch.device("cpu")


def build(args: argparse.Namespace) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50280, hidden_size=args.d_model, num_hidden_layers=args.layers, state_size=args.d_state
    )
    return MambaForCausalLM(config).eval()


def both(model: MambaForCausalLM, run: Callable[[], object], repeats: int) -> dict:
    """Time `run` with the stock and with the fast scan, in turns; switching is not timed."""
    ways = {name: lambda switch=switch: (switch(model), run()) for name, switch in SWITCH.items()}
    return interleave(ways, CPU, repeats, budget=600)


def check(model: MambaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, object]:
    """The cache after the prompt, for decoding; fails unless both agree.

    The bound is wide because random weights are chaotic over 24 layers: in float32, stock itself is 3e-4 from float64.
    """
    wanted = use_stock_scan(model)(ids).logits
    got = use_fast_scan(model)(ids, use_cache=True)
    error = float((got.logits - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-3, f"fast differs from stock by {error:.1e} relative"
    print(f"largest difference of the logits, fast against stock: {error:.1e} of the largest logit\n")
    return got.cache_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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
        inputs = layer_inputs(args.batch, args.length, 2 * args.d_model, args.d_state)
        scan = interleave(contenders(inputs, reference=False), CPU, args.repeats, budget=300)
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
