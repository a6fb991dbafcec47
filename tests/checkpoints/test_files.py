"""Results appear whole or not at all, and nothing of the user's is overwritten."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ssmc.runtime import files
from ssmc.runtime.errors import OutputError
from ssmc.runtime.files import new_directory, refuse_existing, require_space, sha256, write_text
from ssmc.runtime.locks import remove_leftovers

MARKER = "ssmc.json"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path):
    """Whatever happens, no temporary file or directory may remain."""
    yield
    assert [p for p in tmp_path.rglob("*") if p.name.startswith(".")] == []


def fill(path, content="new", **options):
    with new_directory(path, marker=MARKER, **options) as folder:
        (folder / MARKER).write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "content").write_text(content)


def content(path):
    return (path / "sub" / "content").read_text()


# --- new_directory ----------------------------------------------------------------------------------------------------


def test_a_directory_appears_only_when_complete(tmp_path):
    out = tmp_path / "out"
    with new_directory(out) as folder:
        (folder / "a").write_text("1")
        assert folder.parent == tmp_path  # the same disk, so that the rename is atomic
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_it_has_the_permissions_of_any_other_directory(tmp_path):
    fill(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_parents_are_made_and_removed_again_on_failure(tmp_path):
    fill(tmp_path / "a" / "b" / "out")
    assert content(tmp_path / "a" / "b" / "out") == "new"
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "c" / "d" / "out"):
        1 / 0  # noqa: B018
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_things_as_they_were(tmp_path, error, existing):
    out = tmp_path / "out"
    if existing:
        fill(out, "old")

    def interrupted():
        with new_directory(out, force=True) as folder:
            (folder / MARKER).write_text("{}")
            raise error

    with pytest.raises(error):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or content(out) == "old"


def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path):
    program = (
        "import os, sys, signal\nfrom ssmc.runtime.files import new_directory\n"
        "with new_directory(sys.argv[1]) as folder:\n"
        f"    (folder / '{MARKER}').write_text('{{}}')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.tmp-")
    fill(tmp_path / "out")  # and it is in nobody's way
    (said,) = remove_leftovers(tmp_path / "out")
    assert left.name in said
    assert not left.exists()


def test_two_at_one_place(tmp_path):
    """The second is refused before it works, and takes nothing away from the first."""
    with new_directory(tmp_path / "out") as folder:
        (folder / MARKER).write_text("{}")
        for refused in (lambda: refuse_existing(tmp_path / "out"), lambda: fill(tmp_path / "out")):
            with pytest.raises(OutputError, match="Another run is writing"):
                refused()
        assert remove_leftovers(tmp_path / "out") == []
        fill(tmp_path / "other")
    assert (tmp_path / "out" / MARKER).is_file()


def test_existing_output_is_refused_without_force(tmp_path):
    out = tmp_path / "out"
    fill(out, "old")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        fill(out)
    assert content(out) == "old"
    fill(out, force=True)
    assert content(out) == "new"


def test_force_replaces_only_what_carries_the_marker(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputError, match=r"not written by ssmc.*ssmc\.json"):
            fill(out, force=force)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_an_empty_directory_may_stand_there(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert content(tmp_path / "out") == "new"


def test_a_file_is_never_replaced(tmp_path):
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError, match="is a file"):
            fill(tmp_path / "out", force=force)
    assert (tmp_path / "out").read_text() == "mine"


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot be made.*file is a file"):
        fill(tmp_path / "file" / "deep" / "out")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    """It could be, but the shell that stands in it would be left in a deleted folder."""
    fill(tmp_path / "out", "old")
    (tmp_path / "empty").mkdir()
    for folder, out in ((tmp_path / "empty", "."), (tmp_path / "out" / "sub", "..")):
        monkeypatch.chdir(folder)
        with pytest.raises(OutputError, match="current folder"):
            fill(out, force=True)
    assert content(tmp_path / "out") == "old"


def test_a_symbolic_link_stays_a_link(tmp_path):
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    fill(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


def test_a_loop_of_links(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="a cannot be written"):
        fill(tmp_path / "a")


def test_output_that_appears_while_working_is_not_replaced(tmp_path):
    def race():
        with new_directory(tmp_path / "out") as folder:
            (folder / "slow").write_text("slow")
            fill(tmp_path / "elsewhere", "faster")
            (tmp_path / "elsewhere").rename(tmp_path / "out")

    with pytest.raises(OutputError, match="exists already"):
        race()
    assert content(tmp_path / "out") == "faster"


def test_the_old_one_comes_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "old")
    rename = Path.rename

    def failing(self, target):
        if ".tmp-" in self.name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        fill(out, force=True)
    assert content(out) == "old"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_fails_before_the_work(tmp_path, monkeypatch, code):
    """Permissions do not bind root, so the refusal of the system is played."""

    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OutputError, match=os.strerror(code)):
        refuse_existing(tmp_path / "out")
    with pytest.raises(OutputError, match=os.strerror(code)):
        fill(tmp_path / "out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        fill(tmp_path / "locked" / "out")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="this system has no /proc")
def test_a_file_system_that_refuses():
    with pytest.raises(OutputError, match="/proc/out cannot be written"):
        refuse_existing("/proc/out")


def test_a_full_disk_wherever_it_shows(tmp_path):
    def full():
        with new_directory(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"no space left.*--out"):
        full()


def test_a_full_disk_that_safetensors_meets(tmp_path):
    def fill():
        with new_directory(tmp_path / "out"):
            raise SafetensorError(f"Error while serializing: I/O error: x (os error {errno.ENOSPC})")

    with pytest.raises(OutputError, match=r"no space left.*--out"):
        fill()
    assert not list(tmp_path.iterdir())


def test_errors_about_other_files_are_not_called_errors_of_the_output(tmp_path):
    def reading():
        with new_directory(tmp_path / "out"):
            (tmp_path / "not-there").read_text()

    def writing():
        with new_directory(tmp_path / "out") as folder:
            (folder / "no-folder" / "file").write_text("x")

    with pytest.raises(FileNotFoundError):
        reading()
    with pytest.raises(OutputError, match="out cannot be written"):
        writing()


# --- the others -------------------------------------------------------------------------------------------------------


def test_write_text(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "first\n")
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()


def test_write_text_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_write_text_where_it_cannot(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(OutputError, match=r"nowhere.*cannot be written"):
        write_text(tmp_path / "nowhere" / "file", "x")


def test_the_home_of_nobody():
    for refused in (refuse_existing, lambda path: write_text(path, "x"), lambda path: require_space(path, 1)):
        with pytest.raises(OutputError, match="~nobody-here/out"):
            refused("~nobody-here/out")


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_require_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "not" / "yet" / "there", free // 2)
    with pytest.raises(OutputError, match=r"no space left for .*Free \d+ MB or choose"):
        require_space(tmp_path / "not" / "yet" / "there", free + 2**40)


def test_every_file_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "_sync", lambda path: flushed.append((path.name, (tmp_path / "out").exists())))
    fill(tmp_path / "out")
    assert {(MARKER, False), ("content", False)} <= set(flushed)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_directory(tmp_path / "out") as folder:
            save_file({"x": torch.zeros(2)}, folder / "model.safetensors")  # which opens its files to their owner only
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {mode}
