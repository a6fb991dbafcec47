"""Who writes a result right now: folders on their way are locked, so that those of runs that died can be told.

A lock goes with its process, however that ends. Where the system has none (Windows, some network disks) every folder
counts as in use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ssmc.runtime.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder that exists.

    Yields:
        Whether nobody else holds it.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a disk without locks
            yield True
        else:
            yield _same(descriptor, folder)  # whoever had it may have removed it meanwhile
    finally:
        os.close(descriptor)


def on_the_way(target: Path) -> list[Path]:
    """The folders beside `target` in which somebody makes, or made, what shall stand there."""
    if not target.parent.is_dir():
        return []
    starts = (f".{target.name}.tmp-", f".{target.name}.old-", f".{target.name}.partial")
    return sorted(path for path in target.parent.iterdir() if path.name.startswith(starts) and path.is_dir())


def refuse_running(target: Path, named: Path) -> None:
    """Refuse to write where another run writes.

    Args:
        target: what shall be written, resolved.
        named: the same as the user named it.

    Raises:
        OutputError: somebody else is at it.
    """
    for folder in on_the_way(target):
        with contextlib.suppress(FileNotFoundError), locked(folder) as free:
            if not free:
                raise OutputError(
                    f"Another run is writing {named} right now (in {folder.name}). Wait for it, or choose another "
                    "place with --out."
                )


def remove_leftovers(target: Path, but: Path | None = None) -> list[str]:
    """Remove what runs that died left beside `target`.

    Args:
        target: of them.
        but: a folder that stays, of a run that is gone on with.

    Returns:
        A sentence on each.
    """
    said = []
    for folder in on_the_way(target) if fcntl is not None else ():
        with contextlib.suppress(FileNotFoundError), locked(folder) as free:
            if free and folder != but:
                shutil.rmtree(folder, ignore_errors=True)
                said.append(f"Removed {folder.name}, which a run that was cut off had left beside {target.name}.")
    return said


def _same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
