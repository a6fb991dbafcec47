"""Write results so that they appear whole or not at all, and so that nothing of the user's is overwritten."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ssmc.runtime.errors import OutputError
from ssmc.runtime.locks import locked, refuse_running

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MIB = 2**20


@contextlib.contextmanager
def new_directory(path: str | Path, force: bool = False, marker: str = "ssmc.json") -> Iterator[Path]:
    """Fill a directory under a temporary name beside `path`; it takes its name only when the block ends without error.

    On any exception, an interrupt included, the temporary directory is removed and what stood at `path` stays as it
    was. With `force`, the old directory goes only after the new one is complete.

    Args:
        path: the directory to make; its parents are made as well. An empty one may stand there.
        force: replace an earlier result, that is a directory with `marker` in it.
        marker: name of the file that says a directory is one of ours.

    Yields:
        The temporary directory.

    Raises:
        OutputError: `path` exists, cannot be written, or the disk is full.
    """
    path = expand(path)
    refuse_existing(path, force=force, marker=marker)
    target = resolve(path)  # a symbolic link stays, the directory it names is replaced
    temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    missing_parents = [p for p in target.parents if not p.exists()]  # the deepest first
    try:
        with disk_errors(path):
            temporary.mkdir(parents=True)
        with locked(temporary):
            with disk_errors(path, only_inside=temporary):
                yield temporary
            with disk_errors(path):
                publish(temporary, target, path, force=force, marker=marker)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def publish(temporary: Path, target: Path, path: Path, *, force: bool, marker: str) -> None:
    """Give a complete directory its name, `target`, which the user calls `path`; see `new_directory`."""
    _open_to_all(temporary)
    sync_tree(temporary)
    _refuse_standing(path, target, force, marker)  # somebody may have been faster
    _put_in_place(temporary, target)


def refuse_existing(path: str | Path, force: bool = False, marker: str = "ssmc.json") -> None:
    """Check that `new_directory` may write to `path`, so that it fails before minutes of work, not after.

    Raises:
        OutputError: see `new_directory`; or another run is writing there.
    """
    path = expand(path)
    with disk_errors(path):
        target = resolve(path)
        ancestor = _refuse_standing(path, target, force, marker)
        refuse_running(target, path)
        _probe(ancestor if ancestor != target else target.parent, target.name)


def _refuse_standing(path: Path, target: Path, force: bool, marker: str) -> Path:
    """Refuse what stands at a place and may not be replaced; the closest directory above that exists."""
    ancestor = _existing_ancestor(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{path} is a file, not a folder. Choose another place with --out.")
    if not ancestor.is_dir():
        raise OutputError(f"{path} cannot be made: {ancestor} is a file. Choose another place with --out.")
    if target.is_dir():
        _refuse_full(path, target, force, marker)
    return ancestor


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 with `\\n` line ends; readers see the old content or the new, never a part of it.

    Raises:
        OutputError: it cannot be written.
    """
    with replaced_file(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name; it takes its own when the block ends without error.

    Raises:
        OutputError: it cannot be written.
    """
    path = expand(path)
    with disk_errors(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder, a file was to be written there. Choose another name.")
        target = resolve(path)
        temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(directory: str | Path, nbytes: int) -> None:
    """Check that `nbytes` more fit on the disk where `directory` is or will be.

    Raises:
        OutputError: they do not.
    """
    with disk_errors(Path(directory)):
        place = _existing_ancestor(resolve(expand(directory)))
        free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OutputError(
            f"There is no space left for {directory}: it needs {_mib(nbytes)} MB and {_mib(free)} MB are free. "
            f"Free {_mib(nbytes - free)} MB or choose another disk with --out."
        )


def make_room(file: IO[bytes], size: int) -> None:
    """Have an open file of this size, on the disk where the system can promise that.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _refuse_full(path: Path, target: Path, force: bool, marker: str) -> None:
    """Refuse a directory that would lose something by being replaced."""
    if target in (Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{path} is the current folder or contains it. Choose another place with --out.")
    if not any(target.iterdir()):
        return
    ours = (target / marker).is_file()
    if not ours:
        raise OutputError(
            f"{path} exists and was not written by ssmc (no {marker} in it), so it is never replaced. "
            "Choose another place with --out."
        )
    if not force:
        raise OutputError(f"{path} exists already. Replace it with --force or choose another place with --out.")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename the complete directory to its name; what stood there goes last."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    try:
        target.rename(aside)
        temporary.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # the new one is in place: what remains of the old is only litter


def _probe(directory: Path, name: str) -> None:
    """Make and remove a directory: permissions, quotas and read-only file systems all show here.

    It is called as what is on its way to `name`, so that the next run removes it where this one dies in between.
    """
    probe = directory / f".{name}.tmp-{secrets.token_hex(4)}"
    probe.mkdir()
    with contextlib.suppress(FileNotFoundError):  # which a run that starts just now has done
        probe.rmdir()


@contextlib.contextmanager
def disk_errors(path: Path, only_inside: Path | None = None) -> Iterator[None]:
    """Turn errors of the operating system that concern the output into sentences.

    With `only_inside`, errors about files elsewhere pass (something could not be read); a full disk never does.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OutputError(_no_space(path, error.errno)) from error
        if only_inside is not None and not _is_inside(error.filename, only_inside):
            raise
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}. Choose another place with --out.") from error
    except Exception as error:
        # libraries in Rust, safetensors among them, have errors of their own and name the system's at their end
        said = re.search(r"\(os error (\d+)\)", str(error))
        if said is None or int(said[1]) not in DISK_FULL:
            raise
        raise OutputError(_no_space(path, int(said[1]))) from error


def _no_space(path: Path, number: int) -> str:
    return f"There is no space left for {path}: {os.strerror(number)}. Free some or choose another disk with --out."


def _is_inside(name: str | bytes | int | None, directory: Path) -> bool:
    if not isinstance(name, str | bytes):  # no file, or only its descriptor
        return False
    path = Path(os.fsdecode(name))
    return directory in (path, *path.parents)


def expand(path: str | Path) -> Path:
    """A path with `~` in it as a whole one."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # the home of a user who is not there
        raise OutputError(f"{path} cannot be written: {error} Choose another place with --out.") from error


def resolve(path: Path) -> Path:
    """A path without symbolic links."""
    try:
        return path.resolve()
    except RuntimeError as error:  # Python before 3.13
        raise OSError(errno.ELOOP, "it is a loop of symbolic links") from error


def _existing_ancestor(path: Path) -> Path:
    """`path` itself or the closest directory above it that exists."""
    return next((p for p in (path, *path.parents) if os.path.lexists(p)), Path(path.anchor))


def _open_to_all(directory: Path) -> None:
    """Give every file the mode that the umask gives: some libraries write files that only their owner can read."""
    mode = directory.stat().st_mode & 0o666  # mkdir made it by the same umask
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def sync_tree(directory: Path) -> None:
    """Have everything on the disk before it takes its name: a rename may survive a power cut that the data does not."""
    for file in directory.rglob("*"):
        if file.is_file():
            _sync(file)
    if os.name == "posix":
        _sync(directory)


def _sync(path: Path) -> None:
    # Windows flushes only what is open for writing; POSIX opens directories for reading only
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(nbytes: int) -> int:
    """Bytes in MB, rounded up."""
    return -(-nbytes // MIB)


def finite(value: Any) -> Any:
    """JSON has no infinity: a perplexity beyond float64 becomes null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
