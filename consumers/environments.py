"""Environments of the consumers: one folder each in `.consumers`, made from a file of exact versions.

Nothing is put into the environment that runs this. torch alone is shared, since it is large and the same for all: an
environment whose file says so sees what stands beside torch in ours, behind its own packages.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from consumers.asking import ConsumerError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".consumers"
REQUIREMENTS = Path(__file__).parent / "requirements"
SHARED = "# torch is that of .venv"
LIMIT = 600  # seconds to install one


@dataclass(frozen=True)
class Kind:
    """A consumer.

    Attributes:
        name: of its file of requirements.
        title: for people.
        package: whose version is shown.
        script: in `ask/`.
        format: of the exports it reads.
        options: of that format.
        page: of the documentation, in docs/deploy.
        dense: whether it reads a model that was not exported, too.
        software: its name in `ssmc.runtime.models.consumers`.
        by_hand: it has no environment: the one that runs this has it, and it is asked only when it is named.
    """

    name: str
    title: str
    package: str
    script: str
    format: str
    page: str
    options: tuple[tuple[str, str], ...] = ()
    dense: bool = False
    software: str = ""
    by_hand: bool = False


_READS = {"format": "safetensors", "dense": True}
_STOCK = {"script": "ask_transformers.py", "page": "transformers", "software": "transformers", **_READS}
_MLX = {"script": "ask_mlx_lm.py", "page": "mlx-lm", "software": "mlx-lm", **_READS}
_GRAPH = {"format": "onnx", "page": "onnxruntime", "software": "onnxruntime"}
_GENAI = {"format": "onnx", "page": "openvino-genai", "options": (("target", "genai"),), "software": "genai"}
_INTEL = {"format": "onnx", "page": "openvino-genai", "software": "openvino"}
_GGUF = {"format": "gguf", "page": "llama-cpp", "software": "llama.cpp"}

KINDS = (
    Kind("transformers-5", "transformers 5", "transformers", **_STOCK),
    Kind("transformers-4.57", "transformers 4.57", "transformers", **_STOCK),
    Kind("onnxruntime", "onnxruntime", "onnxruntime", "ask_onnxruntime.py", **_GRAPH),
    Kind("llama-cpp", "llama.cpp", "xllamacpp", "ask_llama_cpp.py", **_GGUF),
    Kind("mlx-lm", "mlx-lm, CPU", "mlx-lm", **_MLX),
    Kind("openvino", "OpenVINO", "openvino", "ask_openvino.py", **_INTEL),
    Kind("genai", "onnxruntime-genai", "onnxruntime-genai", "ask_genai.py", **_GENAI),
    Kind("mamba-ssm", "mamba_ssm, GPU", "mamba-ssm", "ask_mamba_ssm.py", "mamba-ssm", "mamba-ssm", by_hand=True),
)


def python_of(kind: Kind) -> Path:
    """The interpreter of a consumer; its environment is made first where it is missing or its file has changed.

    Raises:
        ConsumerError: it cannot be made.
    """
    if kind.by_hand:
        return Path(sys.executable)
    name = kind.name
    folder, wanted = ENVIRONMENTS / name, REQUIREMENTS / f"{name}.txt"
    python, mark = folder / "bin" / "python", folder / ".ready"
    state = hashlib.sha256(wanted.read_bytes() + str(_beside_torch()).encode()).hexdigest()
    if mark.is_file() and mark.read_text() == state:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    command += ["install", "--quiet", "--no-deps", "-r", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConsumerError(f"not installed within {LIMIT} s") from error
    if done.returncode:
        raise ConsumerError(f"cannot be installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1][:200]}")
    if SHARED in wanted.read_text(encoding="utf-8"):
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        (packages / "shared.pth").write_text(f"{_beside_torch()}\n")
    mark.write_text(state)
    return python


def pinned(kind: Kind) -> str:
    """The release of a consumer that its environment holds; empty where that is made by hand."""
    if kind.by_hand:
        return ""
    lines = (REQUIREMENTS / f"{kind.name}.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{kind.package}=="))


def _beside_torch() -> Path:
    """The folder of packages that holds torch."""
    return Path(find_spec("torch").origin).parents[1]
