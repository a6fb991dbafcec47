"""Stock models on a CPU beside mamba_ssm and causal_conv1d: stand-ins raise for CPU tensors as those packages do."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from tests.support.families import FAMILIES
from tests.support.models import logits, random_mamba2, random_model, random_tokens, save_transformers

CALL = """
def {name}(x, *more, **options):
    if not x.is_cuda:
        raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
"""
FILES = {
    "causal_conv1d/__init__.py": ("causal_conv1d_fn", "causal_conv1d_update"),
    "mamba_ssm/ops/selective_scan_interface.py": ("selective_scan_fn", "mamba_inner_fn"),
    "mamba_ssm/ops/triton/selective_state_update.py": ("selective_state_update",),
    "mamba_ssm/ops/triton/ssd_combined.py": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with both packages: what transformers looks for in them, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for name, functions in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        calls = [CALL.format(name=f) for f in functions]
        file.write_text("\n".join(calls), encoding="utf-8")
    for package in ("mamba_ssm", "mamba_ssm/ops", "mamba_ssm/ops/triton"):
        (folder / package / "__init__.py").write_text("", encoding="utf-8")
    imports = ["import mamba_ssm.ops.selective_scan_interface", "import mamba_ssm.ops.triton.selective_state_update"]
    imports += ["import mamba_ssm.ops.triton.ssd_combined"]
    (folder / "mamba_ssm" / "__init__.py").write_text("\n".join(imports), encoding="utf-8")
    return folder


def run(packages, script, *arguments, cwd):
    """What a Python says that has these packages; it must end well."""
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORWARDS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
torch.set_grad_enabled(False)
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    wanted = load_file(folder / "wanted" / "logits.safetensors")
    tokens = wanted["tokens"]
    stock, raised = AutoModelForCausalLM.from_pretrained(folder), False
    try:
        stock(tokens)
    except RuntimeError as error:
        raised = "is_cuda" in str(error)
    ours = load_checkpoint(folder).model
    results = [stock(tokens).logits, ours(tokens).logits, use_fast_scan(ours)(tokens).logits]
    use_stock_scan(ours)
    cached = ours(tokens[:, :-1], use_cache=True)
    name = "past_key_values" if "past_key_values" in cached else "cache_params"
    more = {name: cached[name]}
    if name == "past_key_values":  # some families count from 0 in every call
        more["position_ids"] = torch.full((len(tokens), 1), tokens.shape[1] - 1)
    results.append(torch.cat([cached.logits, ours(tokens[:, -1:], **more).logits], dim=1))
    results.append(ours.train()(tokens).logits)
    scale = wanted["logits"].abs().max()
    found[folder.name] = [raised, *(float((r - wanted["logits"]).abs().max() / scale) for r in results)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model of every family, and its logits where neither package is."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}.items():
        model, tokens = make(), random_tokens((2, 12))
        save_transformers(model, folder / name)
        (folder / name / "wanted").mkdir()
        save_file({"tokens": tokens, "logits": logits(model, tokens)}, folder / name / "wanted" / "logits.safetensors")
    return folder


def test_stock_forwards_of_every_family_run_on_a_cpu(packages, models, tmp_path):
    found = json.loads(run(packages, FORWARDS, models, cwd=tmp_path))
    assert set(found) == {"mamba", "mamba2", *FAMILIES}
    for family, (raised, *differences) in found.items():
        assert raised or family not in ("mamba", "mamba2"), "the stand-ins are not what transformers calls"
        assert max(differences) < 3e-5, family


COMMANDS = """
import sys
from pathlib import Path
from transformers import MambaConfig, MambaForCausalLM
from ssmc.cli import main
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.tiny import TINY_DIRECTORY
config = MambaConfig(vocab_size=4096, hidden_size=16, state_size=4, num_hidden_layers=2)
MambaForCausalLM(config).save_pretrained("model")
load_tokenizer(TINY_DIRECTORY).save_pretrained("model")
bench = "bench --model model --time-budget 1 --repeats 2 --lengths 16 --batch-sizes 1 --decode-tokens 2 --window 64"
for line in (
    "compress model --nsamples 2 --seqlen 64 --quiet --device cpu",
    "export --format safetensors", "export --format mamba-ssm", "export --format onnx",
    f"{bench} --max-windows 2 --device cpu", "eval ssmc-out --text text.txt --device cpu",
    "generate ssmc-out Once --max-new-tokens 3 --device cpu",
):
    if code := main(line.split()):
        raise SystemExit(f"{line}: {code}")
"""


def test_the_commands_run_on_a_cpu(packages, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a bear. " * 40, encoding="utf-8")
    run(packages, COMMANDS, cwd=tmp_path)
    assert (tmp_path / "ssmc-out" / "onnx").is_dir()


MODULE = """
import torch
from transformers import MambaConfig, MambaForCausalLM
from ssmc.compressor import compress
torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
batches = [torch.randint(32, (2, 12)) for _ in range(2)]
small = compress(model, batches, pattern="column", sparsity=0.5).module
print(small(torch.arange(5)[None]).logits.shape[-1])
"""


def test_a_module_in_memory_is_compressed_on_a_cpu(packages, tmp_path):
    assert run(packages, MODULE, cwd=tmp_path).split()[-1] == "32"
