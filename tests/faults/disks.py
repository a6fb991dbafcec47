"""Disks as they are in bad times: small and full, read-only, slow."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.subjects import Disturbance

FILLER, DISK = "filler", 16 << 20  # the file that fills a disk of so many bytes
SLOW_DISK, A_SECOND, WRITES = 48 << 20, 256 << 10, 20  # a slow disk: its size; bytes and writes in a second
THROTTLE = Path("/sys/fs/cgroup/blkio")  # control groups, version 1


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(root: Path) -> None:
    with contextlib.suppress(OSError), (root / FILLER).open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def remount(root: Path, how: str) -> None:
    """Make a disk read-only ("ro"), as a kernel does that met an error on it, or writable again ("rw")."""
    subprocess.run(["mount", "-o", f"remount,{how}", root], check=True)


def full(root: Path) -> Disturbance:
    return Disturbance(lambda: fill(root), "no space", lambda: (root / FILLER).unlink(missing_ok=True))


def readonly(root: Path) -> Disturbance:
    return Disturbance(lambda: remount(root, "ro"), "Read-only file system", lambda: remount(root, "rw"))


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Inside the block a folder is a disk of its own with room for what is written there, and little more."""
    if not wanted:
        yield
        return
    run("mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder)
    try:
        yield
    finally:
        run("umount", "--lazy", folder)


@contextlib.contextmanager
def slow_disk(folder: Path) -> Iterator[None]:
    """Inside the block a folder is a disk that writes A_SECOND bytes a second for this process, each at once.

    A file on a real disk is the disk, and the kernel's own throttle slows it, as it does those of rented machines.

    Raises:
        OSError, CalledProcessError: this user or system cannot have one: it needs root, a loop device and blkio.
    """
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as image, contextlib.ExitStack() as undo:
        image.truncate(SLOW_DISK)
        run("mkfs.ext4", "-q", "-O", "^has_journal", image.name)
        device = run("losetup", "--find", "--show", image.name).strip()
        undo.callback(run, "losetup", "--detach", device)
        run("mount", "-o", "sync,dirsync", device, folder)
        undo.callback(run, "umount", "--lazy", folder)
        group = THROTTLE / f"ssmc-faults-{os.getpid()}"
        group.mkdir()
        undo.callback(group.rmdir)
        number = Path("/sys/block", Path(device).name, "dev").read_text().strip()
        (group / "blkio.throttle.write_bps_device").write_text(f"{number} {A_SECOND}")
        (group / "blkio.throttle.write_iops_device").write_text(f"{number} {WRITES}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        undo.callback((THROTTLE / "cgroup.procs").write_text, str(os.getpid()))
        yield


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
