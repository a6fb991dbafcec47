"""Train `tiny-hybrid`, the embedded hybrid of Mamba-2, attention and MLP layers in transformers' Nemotron-H layout.

    python benchmarks/models/make_tiny_hybrid.py --tokenize tokens.npz  # once, where the stories are
    python benchmarks/models/make_tiny_hybrid.py --tokens tokens.npz --seconds 160 --out OUT  # GPU, or CPU, slower
    python benchmarks/models/make_tiny_hybrid.py --check OUT  # against stock transformers

Training needs torch, numpy and safetensors only, no network and nothing of ssmc, so that it can run on a lent machine.
--seconds is all the time it has, from the start of the program to its end: the learning rate follows the clock. Plans
(epochs, dropout, weight decay, learning rate) are tried in order for as long as there is time for at least 40 % of what
the one before took. OUT holds the best of them on stories that are neither trained on nor reported: model.safetensors
(float16, 7.7 MB), config.json and log.json, put in place whole, and again every --every seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

BEGUN = time.monotonic()  # before torch is imported, which can take long

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).parents[2]
PATTERN = "M-M*-M-M*-M-"  # M: Mamba-2, *: attention, -: MLP
KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 4096,
    "hidden_size": 192,
    "layers_block_type": [KINDS[kind] for kind in PATTERN],
    "mamba_num_heads": 12,
    "mamba_head_dim": 32,
    "ssm_state_size": 64,
    "n_groups": 2,
    "conv_kernel": 4,
    "expand": 2,
    "chunk_size": 64,
    "use_conv_bias": True,
    "use_bias": False,
    "mamba_proj_bias": False,  # these three are defaults, which mlx-lm has not
    "attention_bias": False,
    "mlp_bias": False,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 352,
    "mlp_hidden_act": "relu2",
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
D_MODEL, HEADS, HEAD_DIM, STATES, GROUPS = 192, 12, 32, 64, 2
D_INNER, CHUNK, EPS, DT_MIN = HEADS * HEAD_DIM, 64, 1e-5, 0.001
END, BREAK = 0, (199, 199)  # the end token; two newlines, which stand between the texts where perplexity is measured
BLOCK = 2048  # tokens in a row; every second step reads them as four windows of 512
WARM_UP, FLOOR = 0.04, 0.02  # of a run; of the learning rate


@dataclass(frozen=True)
class Plan:
    """How to train: passes over the text at most, probability of dropout on the residual branches, AdamW's settings."""

    epochs: float
    dropout: float
    decay: float
    rate: float


PLANS = (Plan(24, 0.1, 0.3, 3e-3), Plan(24, 0.2, 0.3, 3e-3), Plan(24, 0.1, 1.0, 3e-3), Plan(24, 0.15, 0.1, 4e-3))


# ---- the model: plain torch, with the tensor names of NVIDIA's checkpoints


class Norm(nn.Module):
    """RMSNorm; with a gate, over groups of channels and after gating, as Mamba-2 does it."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.groups = nn.Parameter(torch.ones(width)), groups

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if gate is None:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, EPS)  # one kernel on a GPU
        grouped = (x.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        return F.rms_norm(grouped, grouped.shape[-1:], eps=EPS).flatten(-2) * self.weight


def ssd(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """Mamba-2's scan, all chunks at once (Mamba-2, section 6); matrix products in the dtype of `x`.

    Args:
        x: (b, L, H, P), L a multiple of CHUNK.
        dt: (b, L, H) in float32.
        A: (H,), negative.
        B: (b, L, G, N).
        C: (b, L, G, N).

    Returns:
        (b, L, H, P) in float32, without the skip of D.
    """
    b, length, heads, head_dim = x.shape
    groups, chunks = B.shape[2], length // CHUNK
    dtype = x.dtype
    drive = (x.float() * dt[..., None]).reshape(b * chunks, CHUNK, heads, head_dim)
    B, C = (m.reshape(b * chunks, CHUNK, groups, -1).transpose(1, 2) for m in (B, C))  # (bc, G, T, N)
    sums = (dt * A).reshape(b * chunks, CHUNK, heads).cumsum(1)  # (bc, T, H)
    by_head = sums.transpose(1, 2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).triu(1)
    decay = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(later, -math.inf).exp()  # (bc, H, t, s)
    pairs = (C @ B.transpose(2, 3))[:, :, None] * decay.to(dtype).unflatten(1, (groups, -1))  # (bc, G, H/G, T, T)
    y = (pairs.flatten(1, 2) @ drive.to(dtype).transpose(1, 2)).transpose(1, 2)  # (bc, T, H, P)
    to_end = (sums[:, -1:] - sums).exp()[..., None]
    left = (drive * to_end).to(dtype).unflatten(2, (groups, -1)).flatten(3).permute(0, 2, 3, 1)  # (bc, G, H/G P, T)
    states = (left @ B).float().reshape(b, chunks, heads, -1)  # what each chunk adds, (b, c, H, P N)
    entering = torch.einsum("bhcz,bzhs->bchs", _between_chunks(sums[:, -1].reshape(b, chunks, heads)), states)
    entering = entering.to(dtype).reshape(b * chunks, groups, -1, B.shape[-1])  # (bc, G, H/G P, N)
    carried = (C @ entering.transpose(2, 3)).transpose(1, 2).reshape(y.shape)
    return (y.float() + carried.float() * sums.exp()[..., None]).reshape(b, length, heads, head_dim)


def _between_chunks(total: torch.Tensor) -> torch.Tensor:
    """What is left of chunk z's addition when chunk c begins, (b, H, c, z), from the exponents of chunks (b, c, H)."""
    sums = total.cumsum(1).transpose(1, 2)  # (b, H, c)
    exponent = (sums - total.transpose(1, 2))[..., :, None] - sums[..., None, :]
    not_before = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=total.device).triu(0)
    return exponent.masked_fill(not_before, -math.inf).exp()


class Mamba(nn.Module):
    """A Mamba-2 mixer."""

    def __init__(self) -> None:
        super().__init__()
        channels = D_INNER + 2 * GROUPS * STATES
        self.in_proj = nn.Linear(D_MODEL, D_INNER + channels + HEADS, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, CONFIG["conv_kernel"], groups=channels)
        self.dt_bias = nn.Parameter(torch.empty(HEADS))
        self.A_log = nn.Parameter(torch.arange(1, HEADS + 1).float().log())
        self.D = nn.Parameter(torch.ones(HEADS))
        self.norm = Norm(D_INNER, GROUPS)
        self.out_proj = nn.Linear(D_INNER, D_MODEL, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, xBC, dt = self.in_proj(x).split([D_INNER, self.conv1d.in_channels, HEADS], -1)
        x, B, C = self.convolve(xBC).split([D_INNER, GROUPS * STATES, GROUPS * STATES], -1)
        x = x.unflatten(-1, (HEADS, HEAD_DIM))
        B, C = (m.unflatten(-1, (GROUPS, STATES)) for m in (B, C))
        dt = F.softplus(dt.float() + self.dt_bias).clamp(min=DT_MIN)  # transformers clamps in this way
        y = ssd(x, dt, -self.A_log.exp(), B, C) + self.D[:, None] * x.float()
        return self.out_proj(self.norm(y.flatten(2), gate))

    def convolve(self, xBC: torch.Tensor) -> torch.Tensor:
        """The causal depthwise convolution and SiLU, (b, L, channels), as sums of shifted rows: fast gradients."""
        taps = self.conv1d.weight.squeeze(1).to(xBC.dtype).unbind(1)
        padded, length = F.pad(xBC, (0, 0, len(taps) - 1, 0)), xBC.shape[1]
        total = self.conv1d.bias.to(xBC.dtype)
        for number, tap in enumerate(taps):
            total = torch.addcmul(total, padded[:, number : number + length], tap)
        return F.silu(total)


class Attention(nn.Module):
    """Causal attention with grouped queries and no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.heads, self.kv_heads = (
            CONFIG[k] for k in ("head_dim", "num_attention_heads", "num_key_value_heads")
        )
        self.q_proj = nn.Linear(D_MODEL, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(D_MODEL, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(D_MODEL, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, D_MODEL, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (m.repeat_interleave(self.heads // self.kv_heads, 1) for m in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two maps with a squared ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(D_MODEL, CONFIG["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(CONFIG["intermediate_size"], D_MODEL, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Block(nn.Module):
    """A norm and a mixer of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = Norm(D_MODEL)
        self.mixer = {"M": Mamba, "*": Attention, "-": Mlp}[kind]()


class Backbone(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(CONFIG["vocab_size"], D_MODEL)
        self.layers = nn.ModuleList(Block(kind) for kind in PATTERN)
        self.norm_f = Norm(D_MODEL)


class Hybrid(nn.Module):
    """The whole model: token ids (b, L), L a multiple of CHUNK, to logits (b, L, vocabulary)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.dropout = Backbone(), dropout
        self.lm_head = nn.Linear(D_MODEL, CONFIG["vocab_size"], bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(self.backbone.embeddings(tokens), self.dropout, self.training)
        for block in self.backbone.layers:
            hidden = hidden + F.dropout(block.mixer(block.norm(hidden)), self.dropout, self.training)
        return self.lm_head(self.backbone.norm_f(hidden))


@torch.no_grad()
def new_model(seed: int, dropout: float) -> Hybrid:
    """Random weights: linear maps by their fan-in, smaller where they write to the residual stream; dt log-uniform."""
    torch.manual_seed(seed)
    model = Hybrid(dropout)
    model.backbone.embeddings.weight.normal_(std=0.1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            writes = name.endswith(("out_proj", "o_proj", "down_proj"))
            module.weight.normal_(std=0.6 * module.in_features**-0.5 * (len(PATTERN) ** -0.5 if writes else 1))
        if isinstance(module, Mamba):
            low, high = math.log(CONFIG["time_step_min"]), math.log(CONFIG["time_step_max"])
            dt = (low + (high - low) * torch.rand(HEADS)).exp()
            module.dt_bias.copy_(dt + (-(-dt).expm1()).log())  # the inverse of softplus
    model.lm_head.weight.normal_(std=0.02)
    return model


# ---- the text


def tokenize(shared: Path, out: Path) -> None:
    """Write train, valid (neither trained on nor reported) and heldout (the embedded text, as ssmc reads it)."""
    from tokenizers import Tokenizer

    tiny = ROOT / "runtime" / "tiny"
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    heldout = _texts(tiny / "heldout.jsonl")
    valid = [text for text in _texts(shared / "data/stories/valid.jsonl") if text not in set(heldout)]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(_texts(shared / "data/stories/train.jsonl"))]
    # Half of the stories end as they end where a model writes, half as they do where perplexity is measured.
    train = [i for number, story in enumerate(ids) for i in (*story, *((END,) if number % 2 else BREAK))]
    streams = [train] + [tokenizer.encode("\n\n".join(texts)).ids for texts in (valid, heldout)]
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays = [np.array(stream, dtype=np.uint16) for stream in streams]
    np.savez_compressed(out, **dict(zip(("train", "valid", "heldout"), arrays, strict=True)))
    print(f"{[len(stream) for stream in streams]} tokens, {out.stat().st_size:,} bytes")


def read_tokens(path: Path, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """The streams that `tokenize` wrote, by name, (T,) int64 each, on a device."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name].astype(np.int64)).to(device) for name in arrays.files}


def _texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def batches(tokens: torch.Tensor, blocks: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, `blocks` x BLOCK tokens each, in a new order from a new start in every epoch.

    Every second batch has them in windows of BLOCK / 4.
    """
    generator = torch.Generator().manual_seed(seed)
    within, number = torch.arange(BLOCK + 1, device=tokens.device), 0
    while True:
        first = int(torch.randint(BLOCK, (1,), generator=generator))
        order = torch.randperm((len(tokens) - first - 1) // BLOCK, generator=generator) * BLOCK + first
        for starts in order[: len(order) // blocks * blocks].to(tokens.device).split(blocks):
            rows = tokens[starts[:, None] + within]
            width = BLOCK if number % 2 else BLOCK // 4
            yield rows[:, :-1].reshape(-1, width), rows[:, 1:].reshape(-1, width)
            number += 1


# ---- training


@torch.no_grad()
def measure(model: Hybrid, tokens: torch.Tensor, window: int, batch: int) -> float:
    """Mean loss in nats a token in float32: windows that do not overlap, window - 1 predictions in each, as ssmc."""
    was_training = model.training
    model.eval()
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    total = 0.0
    for rows in windows.split(batch):
        logits = model(rows)[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    model.train(was_training)
    return total / (len(windows) * (window - 1))


def rate(part: float) -> float:
    """The learning rate, of its peak, when `part` of the run is over: a short warm-up, then a cosine."""
    if part < WARM_UP:
        return 0.05 + 0.95 * part / WARM_UP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, (part - WARM_UP) / (1 - WARM_UP))))


def make_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": plan.decay},
        {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=parameters[0].is_cuda)


class Training:
    """Plans one after the other, the best result on disk."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda"
        self.blocks, self.reserve = (args.blocks or (16 if on_gpu else 1)), (8 if on_gpu else 60)
        self.tokens = read_tokens(args.tokens, self.device)
        sample = len(self.tokens["valid"]) if on_gpu else 16 * BLOCK
        self.valid = self.tokens["valid"][:sample]
        self.best, self.runs = math.inf, []
        args.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the last measurement has to begin."""
        return self.args.seconds - self.reserve - (time.monotonic() - BEGUN)

    def all(self) -> None:
        """Try the plans while there is time, then measure the best as it is on disk."""
        needed = 0.0
        for number, plan in enumerate(PLANS[self.args.first :]):
            if number and self.left() < 0.4 * needed:
                break
            begun = time.monotonic()
            self.run(plan)
            needed = time.monotonic() - begun
        model = new_model(0, 0.0).to(self.device)
        model.load_state_dict({k: t.float() for k, t in load_file(self.args.out / "model.safetensors").items()})
        torch.set_float32_matmul_precision("highest")
        losses = {window: measure(model, self.tokens["heldout"], window, 8) for window in (512, 2048)}
        self.log({"heldout perplexity": {window: math.exp(loss) for window, loss in losses.items()}})

    def run(self, plan: Plan) -> None:
        """Train with one plan, until its epochs or the time are over."""
        model = new_model(self.args.seed, plan.dropout).to(self.device).train()
        optimizer, begun, budget = make_optimizer(model, plan), time.monotonic(), self.left()
        self.runs.append({"plan": asdict(plan), "curve": []})
        wanted, seen, since, saved = plan.epochs * len(self.tokens["train"]), 0, [], begun
        for step, (inputs, targets) in enumerate(batches(self.tokens["train"], self.blocks, self.args.seed)):
            part = max((time.monotonic() - begun) / budget, seen / wanted)
            if part >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * rate(part)
            since.append(self.step(model, optimizer, inputs, targets))
            seen += inputs.numel()
            if step % (200 if self.blocks > 1 else 20) == 0:  # the CPU runs ahead of the GPU no further than this
                mean, since = float(torch.stack(since).mean()), []
                if not math.isfinite(mean):
                    break
                due = time.monotonic() - saved > self.args.every
                saved = time.monotonic() if due else saved
                self.note(model, [step, part, seen, time.monotonic() - begun, mean], due)
        self.note(model, [step, 1.0, seen, time.monotonic() - begun, float("nan")], True)

    def step(
        self, model: Hybrid, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """One step; the loss stays on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def note(self, model: Hybrid, figures: list[float], due: bool) -> None:
        """Print the figures; if `due`, measure on the validation stories and keep the weights if they are the best."""
        figures = [*figures, None]
        if due:
            figures[-1] = measure(model, self.valid, 512, 64 if self.blocks > 1 else 4)
        self.runs[-1]["curve"].append(figures)
        step, part, seen, seconds, mean, valid = figures
        words = f"step {step}, {part:.1%}, {seen:,} tokens, {seconds:.1f} s, loss {mean:.4f}"
        print(words + (f", validation {valid:.4f}" if due else ""), flush=True)
        if due and valid < self.best:
            self.best = valid
            save(model, self.args.out)
        if due:
            self.log({})

    def log(self, more: dict[str, object]) -> None:
        """Write log.json; a row of a curve: step, part of the run, tokens, seconds, training and validation loss."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        facts = {"device": device, "torch": torch.__version__, "blocks": self.blocks, "seed": self.args.seed}
        facts |= {"best validation loss": self.best, "seconds": time.monotonic() - BEGUN} | more
        print(json.dumps(facts), flush=True)
        runs = json.loads(json.dumps(self.runs), parse_constant=lambda _: None)  # JSON has no NaN
        _replace(self.args.out / "log.json", json.dumps(facts | {"runs": runs}).encode())


def save(model: Hybrid, out: Path) -> None:
    """The embedded model: float16 weights and the configuration."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in model.state_dict().items()
    }
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SystemExit("a weight does not fit into float16")
    save_file(tensors, out / "next.safetensors", metadata={"format": "pt"})
    (out / "next.safetensors").replace(out / "model.safetensors")
    _replace(out / "config.json", (json.dumps(CONFIG | {"dtype": "float16"}, indent=1) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name("next-" + path.name)
    beside.write_bytes(content)
    beside.replace(path)


@torch.no_grad()
def check(folder: Path) -> None:
    """Compare the logits of the model above with those of stock transformers, both in float32."""
    from transformers import NemotronHForCausalLM

    stock, loading = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: found for name, found in loading.items() if found}
    ours = Hybrid().eval()
    ours.load_state_dict({k: t.float() for k, t in load_file(folder / "model.safetensors").items()})
    tokens = torch.randint(CONFIG["vocab_size"], (2, 256), generator=torch.Generator().manual_seed(0))
    difference = (ours(tokens) - stock.eval()(tokens).logits).abs().max().item()
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"{parameters:,} parameters; logits differ from stock transformers by at most {difference:.1e}; {problems}")
    if problems or difference > 1e-3:
        raise SystemExit("the model is not what stock transformers takes it for")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="with data/stories")
    parser.add_argument(
        "--tokenize", type=Path, metavar="NPZ", help="do not train: write the tokens of the stories here"
    )
    parser.add_argument("--check", type=Path, metavar="OUT", help="do not train: compare a result with transformers")
    parser.add_argument("--tokens", type=Path, metavar="NPZ", help="what --tokenize wrote")
    parser.add_argument("--out", type=Path, help="where the model and the log go")
    parser.add_argument("--seconds", type=float, default=160, help="all of the time, start and end included")
    parser.add_argument("--every", type=float, default=15, help="seconds between checkpoints")
    parser.add_argument("--blocks", type=int, help=f"blocks of {BLOCK} tokens in a step (16 on a GPU, 1 on a CPU)")
    parser.add_argument("--first", type=int, default=0, help="number of the plan to begin with")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.tokenize:
        tokenize(args.shared, args.tokenize)
    elif args.check:
        check(args.check)
    elif args.tokens and args.out:
        torch.set_float32_matmul_precision("high")
        Training(args).all()
    else:
        parser.error("give --tokens and --out, or --tokenize, or --check")


if __name__ == "__main__":
    main()
