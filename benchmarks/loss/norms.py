"""What states cost where B and C pass norms: a small Falcon-Mamba, made of `tiny` and trained on, pruned in three ways.

    python -m benchmarks.loss.norms [--train ../shared/data/stories/train.jsonl] [--steps 150]

No small trained Falcon-Mamba is published. So `tiny` gets the norms; the mean of what they change is folded into
dt_proj, D and out_proj; and the whole is trained on stories for some steps. Then states go: "sliced" leaves what stays
as it is, in a stock loader, whose norms then see fewer states; "masked" is the same with silent states still counted in
the norms' mean (`ssmc compress --no-repair` and `export`); "repaired" is the default. Figures are the mean negative
log-likelihood above the dense model's, in nats a token, on held-out text in windows that do not overlap.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from benchmarks.pruning import pruned as in_place
from benchmarks.reporting import print_conditions, write_json
from ssmc.compressor import configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import STATE, architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path

RATE = 2e-4
FALCON = architecture_for("falcon_mamba")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=calibration_path(), help="text to train on")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16 * 1024, help="of held-out text")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/norms.json"))
    return parser.parse_args()


@torch.no_grad()
def with_norms(tiny: nn.Module, tokens: torch.Tensor) -> FalconMambaForCausalLM:
    """A Falcon-Mamba of the weights of a Mamba, off only by what the norms change from token to token."""
    sizes = tiny.config.to_dict()
    names = FalconMambaConfig.__dataclass_fields__.keys() - {"model_type"}
    model = FalconMambaForCausalLM(FalconMambaConfig(**{k: v for k, v in sizes.items() if k in names})).eval()
    model.load_state_dict(tiny.state_dict())
    plain, hidden = architecture_for("mamba"), tiny.get_input_embeddings()(tokens)
    for block, own in zip(tiny.backbone.layers, model.backbone.layers, strict=True):
        mixer = block.mixer
        inputs = plain.scan_inputs(mixer, *plain.expand(mixer, plain.normed(block, hidden)))
        low_rank = mixer.x_proj(inputs.u)[..., : mixer.time_step_rank]
        means = [part.square().mean(-1).sqrt().mean() for part in (low_rank, inputs.B, inputs.C)]
        own.mixer.dt_proj.weight *= means[0]
        FALCON.scale_readout({n: own.mixer.get_parameter(n) for n in FALCON.behind_norm}, float(means[1] * means[2]))
        hidden = block(hidden)
    return use_fast_scan(model)


def train(model: nn.Module, stream: torch.Tensor, steps: int, batch: int, length: int) -> None:
    """Adam on the next token, with a falling rate."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(len(stream) - length, (batch,), generator=generator)
        ids = torch.stack([stream[start : start + length] for start in starts])
        loss = model(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.3f}", flush=True)
    model.requires_grad_(False)


def cut(model: nn.Module, kept: list[list[int]], fold: bool) -> nn.Module:
    """The model with these states only; without `fold` every number that stays is as it was."""
    architecture = FALCON if fold else architecture_for("mamba")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    own, smaller = tensors, copy.deepcopy(model.config)
    own, _, _ = architecture.cut(tensors, model.config, STATE, kept)
    smaller.state_size = len(kept[0])
    result = FalconMambaForCausalLM(smaller).eval()
    result.load_state_dict(own)
    return use_fast_scan(result)


def main() -> None:
    args = arguments()
    now = print_conditions()
    checkpoint = load_checkpoint("tiny", dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    samples = draw_samples(calibration_path(), tokenizer, args.nsamples, args.seqlen, 0).tokens
    text = tokenize(read_texts(heldout_path()), tokenizer)[: args.max_tokens]
    model = with_norms(use_fast_scan(checkpoint.model), samples[:4])
    start = perplexity(model, text, args.window).ppl
    train(model, tokenize(read_texts(args.train), tokenizer), args.steps, args.batch, args.length)
    dense = perplexity(model, text, args.window)
    print(f"perplexity {start:.2f} with the norms put in, {dense.ppl:.2f} trained on\n")
    results = {"dense": {"perplexity": dense.ppl, "before_training": start}}
    dtypes = dict.fromkeys(model.state_dict(), torch.float32)
    for sparsity in args.sparsities:
        row: dict[str, float] = {}
        for repair in (False, True):
            pruned = copy.deepcopy(model)
            config = configure(model="falcon_mamba", sparsity=sparsity, repair=repair, nsamples=args.nsamples)
            layers = in_place(pruned, FALCON, samples, config, dtypes).layers
            kept = [list(layer.states_kept) for layer in layers]
            named = {"repaired": cut(pruned, kept, fold=True)}
            if not repair:
                named = {"sliced": cut(model, kept, fold=False), "masked": cut(pruned, kept, fold=True)}
            for name, smaller in named.items():
                row[name] = perplexity(smaller, text, args.window).nll_per_token - dense.nll_per_token
            row[f"spread_{'repaired' if repair else 'masked'}"] = sum(
                layer.states.norm_spread for layer in layers
            ) / len(layers)
        results[f"{sparsity:g}"] = row
        print(f"{sparsity:.0%} of the states gone: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    settings = {name: value for name, value in vars(args).items() if name != "json"} | {"train": Path(args.train).name}
    write_json(args.json, now, settings, results)


if __name__ == "__main__":
    main()
