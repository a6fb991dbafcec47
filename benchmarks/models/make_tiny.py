"""Re-create runtime/tiny, the embedded model and its texts, from the project's shared data; same bytes every time.

    python -m benchmarks.models.make_tiny [--shared ../shared] [--out runtime/tiny]

The trained float32 model becomes float16. The texts are a sample of the stories it was trained on (calibration) and of
those it never saw (held out): stories in the order of their SHA-256, so that the sample depends on no random generator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]

# 64 samples of 2048 tokens and 5 % to spare, counted by the GPT-NeoX tokenizer of the published Mamba checkpoints:
# it needs 11 % fewer tokens for these stories than tiny's own, so what is enough for it is enough for both.
CALIBRATION_TOKENS = 64 * 2048 * 105 // 100
HELDOUT_TOKENS = 40_000  # of tiny's own tokenizer: 19 windows of 2048


def write_model(source: Path, out: Path) -> None:
    """The weights and the configuration, in float16."""
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(source / "model.safetensors").items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SystemExit("a weight does not fit into float16")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["torch_dtype"]
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=1) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, out / name)


def sample(stories: Path, tokenizer: Tokenizer, least: int) -> list[str]:
    """As few stories as hold `least` tokens."""
    with stories.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    taken, tokens = [], 0
    while tokens < least:
        taken.append(texts[len(taken)])
        tokens += len(tokenizer.encode(taken[-1]).ids)
    return taken


def write_texts(texts: list[str], path: Path) -> None:
    """One JSON object with "text" a line."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=ROOT / "runtime" / "tiny")
    arguments = parser.parse_args()
    model, data, out = arguments.shared / "models" / "stories-mamba", arguments.shared / "data", arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_model(model, out)
    own = Tokenizer.from_file(str(model / "tokenizer.json"))
    neox = Tokenizer.from_file(str(data / "tokenizer" / "gpt-neox-20b" / "tokenizer.json"))
    stories = data / "stories"
    write_texts(sample(stories / "train.jsonl", neox, CALIBRATION_TOKENS), out / "calibration.jsonl")
    write_texts(sample(stories / "valid.jsonl", own, HELDOUT_TOKENS), out / "heldout.jsonl")
    for path in sorted(out.glob("*.json*")) + sorted(out.glob("*.safetensors")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.stat().st_size:9,d}  {path.name}")


if __name__ == "__main__":
    main()
