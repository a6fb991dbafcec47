"""The code blocks of README.md and docs/: what they are, and how a test runs them at small sizes.

Every block says its language. `bash` blocks hold commands and `python` blocks Python; both are run, in the order of the
page, in one folder for the page. `text` is output, `yaml` a recipe. Comments in front of a block change this:

    <!-- not run: REASON -->         the next block cannot run here: no GPU, no network, hours
    <!-- run first: COMMAND -->      what an earlier page has done; the reader does not see it
    <!-- output of: COMMAND -->      the next block is what that command of the page printed, numbers aside
    <!-- exit code: N -->            the last command of the next block fails so; a `text` block behind it is its error

In the folder there are a model of the user, `my-model`, and texts, `my-text.jsonl` and `my-heldout.jsonl`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "python", "text", "yaml", "make", "toml")

# What a command is given where the page leaves it to the defaults, which would take minutes.
SMALL = {
    "compress": {"--nsamples": "2", "--seqlen": "64"},
    "bench": {
        "--lengths": "16",
        "--batch-sizes": "1",
        "--decode-tokens": "2",
        "--repeats": "3",
        "--time-budget": "1",
        "--window": "64",
        "--max-windows": "2",
    },
    "eval": {"--window": "64", "--max-windows": "2", "--text": "my-heldout.jsonl"},
    "generate": {"--max-new-tokens": "4"},
}
_COMMENT = re.compile(r"<!-- (not run|run first|exit code|output of): (.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None = None  # the reason
    exit_code: int = 0
    first: tuple[str, ...] = field(default=())  # commands to run before it
    output_of: str | None = None  # the command that printed it

    @property
    def where(self) -> str:
        """For messages: "docs/recipes.md:12"."""
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The commands of a bash block as words, without comments."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, with what the comments in front of them say."""
    found, marks = [], {}
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            for kind, content in _COMMENT.findall(token.content):
                marks.setdefault(kind, []).append(" ".join(content.split()))
        elif token.type == "fence":
            found.append(
                Block(
                    page=str(page.relative_to(ROOT)),
                    line=token.map[0] + 1,
                    language=token.info.split()[0] if token.info.strip() else "",
                    text=token.content,
                    not_run=marks.get("not run", [None])[0],
                    exit_code=int(marks.get("exit code", ["0"])[0]),
                    first=tuple(marks.get("run first", ())),
                    output_of=marks.get("output of", [None])[0],
                )
            )
            marks = {}
    return found


def small(words: list[str]) -> list[str]:
    """The arguments of `ssmc` in a command, with the options that make it quick."""
    arguments = words[1:]
    given = {word.split("=")[0] for word in arguments}
    extra = SMALL.get(arguments[0], {}) if arguments else {}
    if "--help" in given or "-h" in given:
        return arguments
    return arguments + [word for name, value in extra.items() if name not in given for word in (name, value)]
