"""Every command and every Python block of README.md, CONTRIBUTING.md and docs/ does what the page says it does."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import PAGES, ROOT
from tests.docs.pages import lay_out, run_page

APART = ("docs/extending.md",)  # what these pages register would stay for the tests that come after them
SLOW = ("README.md", "docs/choose.md", "docs/quickstart.md")


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=name(p), marks=[pytest.mark.slow] if name(p) in SLOW else []) for p in PAGES]
)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(lay_out(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name(page) not in APART:
        run_page(page)
        return
    command = [sys.executable, "-m", "tests.docs.pages", str(page)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_links_of_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10 * 1024


def test_figures_of_the_documentation_are_in_the_results():
    """A table on a page names its script; the JSON it names exists and is what the script writes."""
    named = {name for page in PAGES for name in re.findall(r"benchmarks/results/[\w/]+\.json", page.read_text("utf-8"))}
    assert named
    for name in named:
        assert json.loads((ROOT / name).read_text(encoding="utf-8")), name
