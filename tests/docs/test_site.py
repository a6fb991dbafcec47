"""The documentation builds strictly and offline, and has what is generated from the code."""

import html
import os
import re
import subprocess
import sys

import pytest

from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.flags import flags_of
from tests.docs.blocks import ROOT

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text(site, page):
    article = re.search(r"<article.*?</article>", (site / page).read_text(encoding="utf-8"), re.DOTALL)[0]
    return html.unescape(re.sub(r"<[^>]+>", " ", article))


def test_the_reference_has_every_command_and_option(site):
    shown = text(site, "command-line.html")
    for command in ("inspect", "compress", "distill", "export", "bench", "eval", "generate", "push"):
        assert f"ssmc {command}" in shown
    for name, _, _, _ in flags_of(CompressConfig):
        if name != "model":
            assert f"--{name.replace('_', '-')}" in shown, name


def test_the_tables_have_every_family_and_format(site):
    shown = text(site, "families.html")
    # in a process of its own: other tests register families and formats here
    program = "from ssmc.exporters import all_formats; from ssmc.runtime.models.families import model_types; "
    program += "print(*model_types(), *all_formats())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [name for name in done.stdout.split() if name not in shown] == []
    assert "mamba2" in done.stdout


def test_no_page_fetches_anything_from_elsewhere(site):
    """It opens from a folder, without a server and without a network."""
    for page in site.rglob("*.html"):
        content = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img)[^>]+src=\"(https?:[^\"]+)\"", content)
        fetched += re.findall(r"<link[^>]+rel=\"stylesheet\"[^>]+href=\"(https?:[^\"]+)\"", content)
        assert not fetched, page.name
