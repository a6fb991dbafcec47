"""What the site takes from the code itself: the reference of the command line, and tables of what there is.

A page asks for a table with a comment of its own line: `<!-- table: NAME -->`; `TABLES` has the names.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mkdocs.structure.files import File, Files
from typer.main import get_command

from ssmc.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"^<!-- table: ([\w-]+) -->$", re.MULTILINE)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)")


def on_startup(**_: Any) -> None:
    """Lay the sources out as they are installed, since the reference of Python is read from files, not imported."""
    package = ROOT / "build" / "sources" / "ssmc"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "ssmc", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli", "compressor", "exporters", "runtime"):
        for source in (ROOT / name).rglob("*.py"):
            target = package / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that nobody writes by hand."""
    files.append(File.generated(config, "command-line.md", content=command_line()))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=_OUTSIDE.sub(r"\1", changelog)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where a page asks for them."""
    return _MARK.sub(lambda match: TABLES[match[1]](), markdown)


def command_line() -> str:
    """The reference of the command line, from the commands themselves."""
    group = get_command(app)
    parts = [
        "# Command line",
        "Generated from the commands. `ssmc COMMAND --help` prints the same.",
        _prose(group.epilog),
    ]
    for name, command in group.commands.items():
        parts += [f"## ssmc {name}", _prose(command.help), *_parameters(command)]
    return "\n\n".join(parts) + "\n"


def _parameters(command: Any) -> Iterable[str]:
    """A table for every panel of a command's help."""
    panels: dict[str, list[list[str]]] = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        panel = getattr(parameter, "rich_help_panel", None) or "Arguments"
        panels.setdefault(panel, []).append(_parameter(parameter))
    for panel, rows in panels.items():
        yield f"**{panel}**"
        yield table(("", "", "default"), rows)


def _parameter(parameter: Any) -> list[str]:
    names = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]
    metavar = parameter.metavar or _choices(parameter)
    shown = ", ".join(f"`{name}`" for name in names) or f"`{parameter.metavar}`"
    if names and metavar:
        shown += f" `{metavar}`"
    return [shown, parameter.help or "", _default(parameter)]


def _choices(parameter: Any) -> str:
    """The words of a Literal, of which the type of an option is made."""
    annotation = getattr(parameter.type_descriptor, "annotation", None)
    inner = [entry for entry in get_args(annotation) if get_origin(entry) is Literal]
    words = get_args(inner[0] if inner else annotation) if inner or get_origin(annotation) is Literal else ()
    return "|".join(map(str, words))


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    if parameter.show_default is False or value is None or callable(value) or value is False or str(value) == "":
        return ""
    return "" if "UNSET" in repr(value) else f"`{value}`" if value is not True else f"`{parameter.opts[0]}`"


def _prose(text: str | None) -> str:
    """The help of a command: its indented examples become a block."""
    lines, block = [], []
    for line in (text or "").splitlines():
        if line.startswith("    "):
            block.append(line.strip())
        elif block and not line.strip():
            continue
        else:
            lines += [*_fenced(block), line]
            block = []
    return "\n".join([*lines, *_fenced(block)])


def _fenced(block: Sequence[str]) -> list[str]:
    return ["```bash", *block, "```", ""] if block else []


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scores() -> str:
    """Which scores decide about which pattern, the default first, and what they go by."""
    from ssmc.compressor.options.patterns import described_scores, patterns

    rows = [
        (f"`{pattern}`" if first else "", f"`{score}`", help)
        for pattern in patterns()
        for first, (score, help) in zip([True] + [False] * 99, described_scores(pattern).items(), strict=False)
    ]
    return table(("pattern", "importance score, the default first", "what it does"), rows)


def options() -> str:
    """The options of a compression run, as Python and recipes name them."""
    from ssmc.compressor.options.config import CompressConfig
    from ssmc.compressor.options.flags import flags_of
    from ssmc.compressor.options.goal import Goal

    rows = []
    for declared in (CompressConfig, Goal):
        for name, flag, _, default in flags_of(declared):
            shown = flag.default_text if flag.default_text is not None else f"`{getattr(default, 'value', default)}`"
            rows.append((f"`{name}`", flag.text, shown))
    return table(("option", "what it does", "default"), rows)


def families() -> str:
    """What every family can be pruned by and exported to."""
    from ssmc.compressor.families import parts_of
    from ssmc.exporters import all_formats, missing_formats
    from ssmc.runtime.models import families as known

    rows = []
    for family in known.families():
        missing = missing_formats(family)
        able = ", ".join(f"`{pattern}`" for pattern in parts_of(family))
        formats = ", ".join(f"`{format}`" for format in all_formats() if format not in missing)
        rows.append((f"`{family.model_type}`", able, formats))
    return table(("`model_type`", "patterns", "formats"), rows)


def refusals() -> str:
    """What is refused for which family, and why."""
    from ssmc.compressor.families import limits
    from ssmc.exporters import missing_formats
    from ssmc.runtime.models import families as known

    reasons: dict[tuple[str, str], list[str]] = {}
    for family in known.families():
        missing = {f"--format {name}": reason for name, reason in missing_formats(family).items()}
        for option, reason in (limits(family) | missing).items():
            key = (option, reason.replace(f"type {family.model_type}", "this type"))
            reasons.setdefault(key, []).append(f"`{family.model_type}`")
    rows = [(f"`{option}`", ", ".join(names), reason) for (option, reason), names in reasons.items()]
    return table(("option", "families", "why"), sorted(rows))


def runtimes() -> str:
    """Which runtimes take the two main families, for the embedded models with half of their states."""
    from ssmc.exporters import runs_where
    from ssmc.runtime.models.checkpoints import load_checkpoint

    parts = []
    for name in ("tiny", "tiny-mamba2"):
        checkpoint = load_checkpoint(name)
        sizes = checkpoint.dimensions
        changed = {"n_layer": sizes.n_layer, "d_inner": sizes.d_inner, "d_state": sizes.d_state // 2}
        halved = checkpoint.architecture.dimensions(checkpoint.architecture.resized(checkpoint.config, **changed))
        found = runs_where(halved, sizes.d_state, checkpoint.architecture.model_type)
        rows = [(r.name, f"`{r.reads}`", "yes" if r.runs else "no", r.remark) for r in found]
        parts += [
            f"`{name}` with {halved.d_state} of {sizes.d_state} states:",
            table(("runtime", "format", "runs", ""), rows),
        ]
    return "\n\n".join(parts)


def consumers() -> str:
    """What other people's software made of our exports, when it was last asked."""
    from consumers.results import markdown, read_rows

    return markdown(read_rows())


def consumers_speed() -> str:
    """How fast other people's software runs dense and pruned models."""
    from benchmarks.speed.consumers_report import markdown, read_records

    return markdown(read_records(ROOT / "benchmarks" / "results" / "consumers_speed.json"))


def exit_codes() -> str:
    """The error classes with their exit codes."""
    from ssmc.runtime import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    rows = [(str(c.exit_code), f"`{c.__name__}`", " ".join((c.__doc__ or "").split())) for c in classes]
    return table(("exit code", "class", "what it means"), sorted(rows))


TABLES: dict[str, Callable[[], str]] = {
    "options": options,
    "scores": scores,
    "families": families,
    "refusals": refusals,
    "runtimes": runtimes,
    "consumers": consumers,
    "consumers-speed": consumers_speed,
    "exit-codes": exit_codes,
}
