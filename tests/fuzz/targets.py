"""What is read: for every kind of file valid ones to start from, what reads it, and a command that does."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.guard import TIMES
from tests.fuzz.mutations import byte_strings, json_documents

TEXT = "Once upon a time a small dog found a red ball. It was 3 o'clock, and the sun shone.\n"
SEEDS = Path(__file__).parent / "seeds"
"""Inputs that were once read wrongly, `TARGET/SEED--WHAT`: each stands where SEED stood."""


@dataclass(frozen=True)
class Seed:
    """A valid file.

    Attributes:
        name: tells it from the target's others.
        file: where it lies, among the files that belong to it.
        inside: JSON that describes its content; None where only its bytes are changed.
        wrap: from such JSON to the file.
    """

    name: str
    file: Path
    inside: bytes | None = None
    wrap: Callable[[bytes], bytes] = field(default=lambda content: content)

    def mutations(self) -> st.SearchStrategy[bytes]:
        """Files that are not quite this one."""
        raw = byte_strings(self.file.read_bytes())
        if self.inside is None:
            return raw
        inner = json_documents(self.inside).map(self.wrap)
        return st.one_of(inner, inner, inner, raw)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: of the kind.
        seeds: valid ones.
        read: reads the one at a place.
        command: arguments of a command that reads it, given its place and a folder for results.
        times: memory that reading may take, in times the input.
    """

    name: str
    seeds: tuple[Seed, ...]
    read: Callable[[Path], object]
    command: Callable[[Path, Path], Sequence[str]]
    times: int = TIMES


def _json_seed(name: str, file: Path) -> Seed:
    return Seed(name, file, json.dumps(json.loads(file.read_text(encoding="utf-8"))).encode())


def _compress(model: Path, out: Path) -> list[str]:
    return ["compress", str(model), "--out", str(out), "--score", "magnitude", "--no-repair", "--sparsity", "0.5"]


@cache
def _models(base: Path) -> dict[str, Path]:
    """Folders of small models of several kinds, by name."""
    from tests.support import families
    from tests.support.models import random_mamba2, random_model, save_mamba_ssm, save_transformers

    small = {"num_hidden_layers": 1, "hidden_size": 8, "state_size": 4, "time_step_rank": 2}
    made = {
        "mamba": save_transformers(random_model(**small), base / "mamba"),
        "mamba2": save_transformers(random_mamba2(num_hidden_layers=1), base / "mamba2"),
        "nemotron_h": save_transformers(families.nemotron_h(), base / "nemotron_h"),
        "jamba": save_transformers(families.jamba(), base / "jamba"),
        "mamba-ssm": save_mamba_ssm(random_model(**small), base / "mamba-ssm"),
        "sharded": save_transformers(random_model(**small), base / "sharded", max_shard_size="2KB"),
    }
    return made


def _load(file: Path) -> object:
    from ssmc.runtime.models.checkpoints import load_checkpoint
    from ssmc.runtime.models.outline import read_outline

    read_outline(file.parent)
    return load_checkpoint(file.parent)


def configurations(base: Path) -> Target:
    """config.json."""
    names = ("mamba", "mamba2", "nemotron_h", "jamba", "mamba-ssm")
    seeds = tuple(_json_seed(name, _models(base)[name] / "config.json") for name in names)
    return Target("config", seeds, _load, lambda file, out: ["inspect", str(file.parent), "--json", str(out)])


def generation_configurations(base: Path) -> Target:
    """generation_config.json."""
    seeds = (_json_seed("mamba", _models(base)["mamba"] / "generation_config.json"),)
    return Target("generation-config", seeds, _load, lambda file, out: _compress(file.parent, out))


def headers(base: Path) -> Target:
    """Headers of safetensors files."""
    seeds = []
    for name in ("mamba", "mamba2"):
        file = _models(base)[name] / "model.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")

        def wrap(header: bytes, rest: bytes = content[end:]) -> bytes:
            return len(header).to_bytes(8, "little") + header + rest

        seeds.append(Seed(name, file, content[8:end], wrap))
    return Target("safetensors", tuple(seeds), _load, lambda file, out: _compress(file.parent, out))


def indexes(base: Path) -> Target:
    """Indexes of shards."""
    seeds = (_json_seed("sharded", _models(base)["sharded"] / "model.safetensors.index.json"),)
    return Target("index", seeds, _load, lambda file, out: _compress(file.parent, out))


@cache
def _with_tokenizer(base: Path) -> Path:
    from tests.support.models import random_model
    from tests.support.vocabularies import save

    folder = save(random_model(num_hidden_layers=1, hidden_size=8, vocab_size=400), base / "tokenizer")
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


def _tokenize(file: Path) -> object:
    from ssmc.runtime.models.tokenizers import load_tokenizer
    from ssmc.runtime.text.reading import token_ids

    return token_ids(TEXT, load_tokenizer(file.parent))


def _calibrated(model: Path, out: Path, text: Path | None = None) -> list[str]:
    text = model / "text.txt" if text is None else text
    few = ("--nsamples", "2", "--seqlen", "16", "--score", "energy", "--calib", str(text))
    return ["compress", str(model), "--out", str(out), *few]


def tokenizers(base: Path) -> Target:
    """tokenizer.json, and what describes it."""
    folder = _with_tokenizer(base)
    seeds = tuple(_json_seed(name.split(".")[0], folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    return Target("tokenizer", seeds, _tokenize, lambda file, out: _calibrated(file.parent, out))


@cache
def _artefacts(base: Path) -> dict[str, Path]:
    """A compressed model, and exports of it."""
    from ssmc.compressor import compress
    from ssmc.exporters import export

    out = base / "artefact"
    compress(
        str(_models(base)["mamba"]), out=out, pattern="column+channel", score="magnitude", repair=False, sparsity=0.5
    )
    onnx = export(out, format="onnx").directory
    return {"masked": out, "onnx": Path(onnx)}


def manifests(base: Path) -> Target:
    """ssmc.json of a compressed model."""
    folder = _artefacts(base)["masked"]

    @cache
    def model() -> Any:
        from ssmc.runtime.models.checkpoints import load_checkpoint

        return load_checkpoint(folder)

    def read(file: Path) -> object:
        from ssmc.exporters.cutting import shrink
        from ssmc.runtime.manifest import read_compressed, read_manifest

        masked = model()
        read_manifest(file.parent)
        return shrink(masked, read_compressed(file.parent))

    seeds = (_json_seed("masked", folder / "ssmc.json"),)
    return Target("manifest", seeds, read, lambda file, out: ["export", str(file.parent), "--out", str(out)])


def export_manifests(base: Path) -> Target:
    """ssmc.json of an export."""
    onnx = _artefacts(base)["onnx"]
    gguf = base / "gguf"
    gguf.mkdir(exist_ok=True)
    record = json.loads((onnx / "ssmc.json").read_text()) | {"format": "gguf", "gguf": {"quantize": "q8_0"}}
    (gguf / "ssmc.json").write_text(json.dumps(record))

    def read(file: Path) -> object:
        from ssmc.runtime.models.generation.onnx_export import load_onnx_export
        from ssmc.runtime.models.generation.onnx_graph import is_onnx_export
        from ssmc.runtime.models.llama_cpp import is_gguf_export
        from ssmc.runtime.models.llama_cpp.export import described

        is_onnx_export(file.parent)
        is_gguf_export(file.parent)
        return load_onnx_export(file.parent) if file.parent == onnx else described(file.parent)

    seeds = (_json_seed("onnx", onnx / "ssmc.json"), _json_seed("gguf", gguf / "ssmc.json"))
    return Target("export-manifest", seeds, read, lambda file, out: ["export", str(file.parent), "--out", str(out)])


def recipes(base: Path) -> Target:
    """recipe.yaml: JSON is YAML, and the bytes are those of a recipe."""
    import yaml

    folder = base / "recipes"
    folder.mkdir(exist_ok=True)
    model = str(_models(base)["mamba"])
    written = (_artefacts(base)["masked"] / "recipe.yaml").read_text(encoding="utf-8")
    goal = {"model": model, "target_params": 0.7, "pattern": "column+channel", "max_ppl_increase": 0.1}
    parts = {"model": model, "pattern": "column+channel", "sparsity": {"column": 0.5, "channel": 0.25}, "seed": 3}
    seeds = []
    for name, content in (("written", yaml.safe_load(written)), ("goal", goal), ("parts", parts)):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        seeds.append(Seed(name, file, json.dumps(content).encode()))

    def read(file: Path) -> object:
        from ssmc.compressor.options.config import configure
        from ssmc.compressor.options.goal import split_goal
        from ssmc.compressor.options.recipe import read_recipe

        goal, ordinary = split_goal(read_recipe(file))
        return goal, configure(**ordinary)

    def command(file: Path, out: Path) -> list[str]:
        return ["compress", model, "--recipe", str(file), "--score", "magnitude", "--no-repair", "--out", str(out)]

    return Target("recipe", tuple(seeds), read, command)


def latency_tables(base: Path) -> Target:
    """Latency tables, and bench.json, which `bench` must know as its own before it replaces it."""
    folder = base / "tables"
    folder.mkdir(exist_ok=True)
    from dataclasses import asdict

    from ssmc.runtime.measure.latency import SCHEMA, LatencyTable, Workload
    from ssmc.runtime.models.checkpoints import read_dimensions

    sizes = read_dimensions(_with_tokenizer(base))
    width, states = sizes.d_inner, sizes.d_state
    seconds = ((1e-4, 2e-4), (2e-4, 3e-4))
    made = LatencyTable(
        sizes,
        Workload("decode", 1, 1),
        "cpu",
        "float32",
        (width // 2, width),
        (states // 2, states),
        seconds,
        1e-4,
        1,
        5,
        {},
    )
    table = {"schema": SCHEMA, **asdict(made)}
    bench = {"schema": "ssmc-bench/1", "models": [], "measurements": [], "notes": []}
    for name, content in (("table", table), ("bench", bench)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{name}.json").write_text(json.dumps(content))

    def read(file: Path) -> object:
        from ssmc.runtime.bench.report import check_output
        from ssmc.runtime.measure.latency import read_latency_table

        return check_output(file.parent) if file.stem == "bench" else read_latency_table(file).dense

    def command(file: Path, out: Path) -> list[str]:
        goal = ("--target-latency", "0.7", "--latency-table", str(file))
        return [*_calibrated(_with_tokenizer(base), out), *goal]

    seeds = tuple(_json_seed(name, folder / name / f"{name}.json") for name in ("table", "bench"))
    return Target("bench", seeds, read, command)


def texts(base: Path) -> Target:
    """Calibration text in every layout and compression that is read."""
    import pyarrow
    import pyarrow.parquet

    folder = base / "texts"
    folder.mkdir(exist_ok=True)
    rows = [{"text": f"{TEXT}{number}", "id": number} for number in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pyarrow.table({"text": [row["text"] for row in rows]})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    contents = {
        "prose.txt": (TEXT * 20).encode(),
        "utf16.txt": (TEXT * 20).encode("utf-16"),
        "lines.jsonl": lines,
        "array.json": json.dumps(rows).encode(),
        "lines.jsonl.gz": gzip.compress(lines, mtime=0),
        "prose.txt.bz2": bz2.compress((TEXT * 20).encode()),
        "lines.xz": lzma.compress(lines),
        "prose.zst": pyarrow.compress((TEXT * 20).encode(), codec="zstd", asbytes=True),
        "rows.parquet": sink.getvalue(),
    }
    wraps = {"lines.jsonl.gz": lambda c: gzip.compress(c, 1, mtime=0), "lines.xz": lambda c: lzma.compress(c, preset=0)}
    seeds = []
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        if name in wraps:
            seeds.append(Seed(name, folder / name, json.dumps(rows[0]).encode(), wraps[name]))
        else:
            seeds.append(Seed(name, folder / name, content if name.endswith("json") else None))

    def read(file: Path) -> object:
        from ssmc.runtime.models.tokenizers import load_tokenizer
        from ssmc.runtime.text import draw_windows, read_texts

        read_texts(file)
        return draw_windows(file, load_tokenizer(_with_tokenizer(base)), 2, 16, 0)

    def command(file: Path, out: Path) -> list[str]:
        return _calibrated(_with_tokenizer(base), out, file)

    return Target("text", tuple(seeds), read, command, times=400)  # what the tokenizer library keeps of a token a byte


def tasks(base: Path) -> Target:
    """Documents of evaluation tasks."""
    from tests.support.tasks import HERE, write_lines

    seeds = []
    for name in ("piqa", "arc_easy"):
        file = write_lines(base / "tasks" / f"{name}.jsonl", HERE[name])
        seeds.append(Seed(name, file, json.dumps(HERE[name][0]).encode(), _after(file.read_bytes())))

    def read(file: Path) -> object:
        from ssmc.runtime.evaluation.documents import read_documents

        return read_documents(file, file.stem)

    def command(file: Path, out: Path) -> list[str]:
        model = str(_with_tokenizer(base))
        return ["eval", "--dense", model, "--model", model, "--tasks", file.stem, "--data", str(file.parent)]

    return Target("tasks", tuple(seeds), read, command)


def _after(lines: bytes) -> Callable[[bytes], bytes]:
    return lambda row: lines + row + b"\n"


def graphs(base: Path) -> Target:
    """model.onnx without a manifest that vouches for it: its graph as protobuf's JSON, and its bytes."""
    import onnx
    from google.protobuf import json_format

    folder = base / "graph"
    source = _artefacts(base)["onnx"]
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("ssmc.json", "recipe.yaml"))
    file = folder / "model.onnx"
    content = file.read_bytes()
    described = json_format.MessageToDict(onnx.load(file, load_external_data=False))

    def wrap(inside: bytes) -> bytes:
        try:
            return json_format.ParseDict(json.loads(inside), onnx.ModelProto(), True).SerializeToString()
        except Exception:  # what protobuf cannot say cannot stand in a file either
            spoilt = random.Random(inside).randrange(len(content))
            return content[:spoilt] + content[spoilt + 1 :]

    def read(file: Path) -> object:
        from ssmc.runtime.models.generation.onnx_graph import open_graph

        return open_graph(file.parent, "cpu")

    def command(file: Path, out: Path) -> list[str]:
        return ["generate", str(file.parent), "--tokenizer", str(_with_tokenizer(base)), "a", "--max-new-tokens", "2"]

    seed = Seed("graph", file, json.dumps(described).encode(), wrap)
    return Target("onnx", (seed,), read, command)


def ggufs(base: Path) -> Target:
    """Headers of GGUF files, as an export reads back what it wrote."""
    import numpy as np
    from gguf import GGUFWriter

    folder = base / "file"
    folder.mkdir(exist_ok=True)
    file = folder / "model.gguf"
    writer = GGUFWriter(file, "mamba")
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read(file: Path) -> object:
        from ssmc.exporters.gguf.write import read_tensors

        return read_tensors(file)

    def command(file: Path, out: Path) -> list[str]:
        return ["generate", str(file.parent), "a", "--max-new-tokens", "2"]

    return Target("gguf", (Seed("gguf", file),), read, command)


MAKERS = (configurations, generation_configurations, headers, indexes, tokenizers, manifests, export_manifests)
MAKERS += (recipes, latency_tables, texts, tasks, graphs, ggufs)
NAMES = ("config", "generation-config", "safetensors", "index", "tokenizer", "manifest", "export-manifest")
NAMES += ("recipe", "bench", "text", "tasks", "onnx", "gguf")


def target(name: str, base: Path) -> Target:
    """A target with its files in a folder."""
    base.mkdir(parents=True, exist_ok=True)
    return MAKERS[NAMES.index(name)](base)
