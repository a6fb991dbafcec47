"""Models larger than memory: how much of it `inspect`, `compress` and `export` need, measured in fresh processes.

A model of the sizes of a published one is made of random numbers, in bfloat16 and in shards. Then each command runs on
it, and the most that its process ever had resident is read from the system (VmHWM of Linux).

    python -m benchmarks.memory.larger --shape mamba-2.8b --out benchmarks/results/larger.json
    python -m benchmarks.memory.larger --shape nemotron-h-8b --zeros --options "--score magnitude --no-repair"

With --zeros matrices are what the system gives for files that nobody wrote, so a model is there in seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import MambaConfig, NemotronHConfig, PretrainedConfig

from benchmarks.reporting import print_conditions
from ssmc.runtime.measure.conditions import Conditions, load_average
from ssmc.runtime.models.checkpoints.model import outline_model
from ssmc.runtime.models.checkpoints.transformers_format import write_config
from ssmc.runtime.models.checkpoints.writing import Shards
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.tiny import TINY_DIRECTORY

SHARD = "2GB"
PEAK = (
    "import sys; from ssmc.cli import main; code = main(sys.argv[1:]); "
    "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1], file=sys.stderr); "
    "sys.exit(code)"
)


def mamba(layers: int = 64, d_model: int = 2560) -> PretrainedConfig:
    """state-spaces/mamba-2.8b."""
    return MambaConfig(vocab_size=50280, hidden_size=d_model, num_hidden_layers=layers, tie_word_embeddings=True)


def nemotron(layers: int = 52) -> PretrainedConfig:
    """nvidia/Nemotron-H-8B-Base-8K: 24 Mamba-2 layers, 24 MLPs and 4 of attention; fewer of each, in its order."""
    kinds = ("M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-")[:layers]
    names = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
    return NemotronHConfig(
        vocab_size=131072,
        hidden_size=4096,
        intermediate_size=21504,
        layers_block_type=[names[kind] for kind in kinds],
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=128,
        conv_kernel=4,
        tie_word_embeddings=False,
    )


SHAPES = {"mamba-2.8b": mamba, "nemotron-h-8b": nemotron}


def numbers(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of about the size that trained ones have."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.log(1 + torch.arange(noise.numel()) % shape[-1]).view(shape)
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return 1 + 0.1 * noise
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return noise - 4
    return noise * (0.02 if len(shape) > 1 else 0.1)


def make(folder: Path, config: PretrainedConfig, zeros: bool = False) -> int:
    """Write a model of random numbers, or one whose matrices are zeros; how many parameters it has."""
    folder.mkdir(parents=True)
    model, generator = outline_model(config, "the model"), torch.Generator().manual_seed(0)
    state = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    architecture = architecture_for(config.model_type)
    config.dtype = torch.bfloat16
    write_config(folder / "config.json", state, config)
    shards = Shards(folder, architecture.to_stored(state), SHARD)
    for name, tensor in state.items():
        if zeros and tensor.dim() > 1:
            continue
        shards.put(architecture.to_stored({name: numbers(name, tensor.shape, generator).to(torch.bfloat16)}))
    shards.close()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_DIRECTORY / name, folder)
    return sum(tensor.numel() for tensor in state.values())


def run(*arguments: str) -> dict[str, float]:
    """Run a command of ssmc in a process of its own: seconds, those of its processor, and MB resident at most."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ssmc {' '.join(arguments)}: {done.stderr}")
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"seconds": seconds, "processor_seconds": worked, "resident_mb": int(done.stderr.split()[-1]) / 1024}


def commands(folder: Path, work: Path, limit: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each of the commands, one after the other; `limit` is given to compress besides."""
    pruned = work / "pruned"
    yield "inspect", run("inspect", str(folder))
    yield (
        "compress --pattern column",
        run("compress", str(folder), "--nsamples", "2", "--seqlen", "256", "--out", str(pruned), *limit),
    )
    yield "export", run("export", str(pruned), "--out", str(work / "exported"))


def record_of(
    now: Conditions, config: PretrainedConfig, parameters: int, size: int, found: dict[str, dict[str, float]]
) -> dict[str, object]:
    """What is known of a model and the commands so far."""
    return {
        "conditions": asdict(now),
        "load_after": load_average(),
        "layers": config.num_hidden_layers,
        "parameters": parameters,
        "bytes_on_disk": size,
        "results": found,
    }


def write(path: Path, shape: str, record: dict[str, object]) -> None:
    """Write the figures of a shape beside those of others."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | {shape: record}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make a model, run the commands, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mamba-2.8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the published model")
    parser.add_argument("--work", type=Path, default=Path("larger-than-memory"), help="folder for some 20 GB")
    parser.add_argument("--zeros", action="store_true", help="matrices of zeros, which nobody writes")
    parser.add_argument("--options", default="", help="more options of ssmc compress, in quotes")
    parser.add_argument("--keep", action="store_true", help="leave the models where they are")
    parser.add_argument("--name", help="of the record in the file; by default the shape")
    parser.add_argument("--out", type=Path, help="JSON file; other records in it stay")
    asked = parser.parse_args()
    now = print_conditions(torch.bfloat16)
    config = SHAPES[asked.shape](**({"layers": asked.layers} if asked.layers else {}))
    folder = asked.work / "model"
    if not folder.exists():
        parameters = make(folder, config, asked.zeros)
    else:
        parameters = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{asked.shape}, {config.num_hidden_layers} layers: {parameters:,} parameters, {size / 1e9:.2f} GB on disk")
    found = {}
    for name, result in commands(folder, asked.work, shlex.split(asked.options)):
        found[name] = result
        if asked.out is not None:
            write(asked.out, asked.name or asked.shape, record_of(now, config, parameters, size, found))
        print(f"  {name:<28} {result['seconds']:8.1f} s {result['resident_mb']:8.0f} MB resident", flush=True)
    if not asked.keep:
        shutil.rmtree(asked.work)


if __name__ == "__main__":
    main()
