"""What must hold for whatever is read: one of our errors or none, soon, in little memory, nothing touched."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import SsmcError

SECONDS, WALL = 10.0, 120.0  # of this process, and of the clock: a busy machine is no hang
TIMES, FLOOR = 4, 48 << 20  # memory: so many times the input, above what allocators and parsers take for nothing
LONGEST = 1500  # characters of a message
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNNING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "pty.spawn")
_CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


def _below(folder: int, path: str | bytes) -> str:
    """A path within an open folder; what is no open folder is a mode that happens to stand there."""
    with contextlib.suppress(OSError):
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    return os.fsdecode(path)


_TIMERS = (
    (signal.SIGPROF, signal.ITIMER_PROF, lambda: SECONDS),
    (signal.SIGALRM, signal.ITIMER_REAL, lambda: WALL),
)


class Violation(AssertionError):
    """A property that does not hold; `place` tells equal ones from others."""

    def __init__(self, kind: str, what: str, place: str = ""):
        super().__init__(f"{kind}: {what}")
        self.kind, self.place = kind, place


class _Watch:
    """Sees what the process does, by Python's audit events; there is one, since hooks cannot be removed."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None  # folders that may be written to; None: not watching
        self.may_run = False
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & _WRITING:
                self._path(event, path)
        elif event in _CHANGING:
            folder = arguments[-1] if isinstance(arguments[-1], int) and arguments[-1] >= 0 else None
            for path in arguments[:2]:
                if isinstance(path, (str, bytes)):
                    self._path(event, path if folder is None else _below(folder, path))
        elif event in _RUNNING and not self.may_run:
            self.seen.append(f"{event} {arguments[:1]}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self.seen.append(f"{event} {arguments[1:]}")
        elif event == "exec" and getattr(arguments[0], "co_filename", "").startswith(self.allowed):
            self.seen.append(f"exec of {arguments[0].co_filename}")

    def _path(self, event: str, path: str | bytes) -> None:
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith((*self.allowed, "/dev/")):
            self.seen.append(f"{event} {name}")


_watch: _Watch | None = None


def watch() -> _Watch:
    """The one that watches this process."""
    global _watch
    _watch = _watch or _Watch()
    return _watch


@contextlib.contextmanager
def properties(folder: Path, size: int, times: int = TIMES, *, may_run: bool = False) -> Iterator[None]:
    """Whether everything holds in a block, errors aside.

    Args:
        folder: what the block may write to.
        size: bytes of its input.
        times: memory it may take, in times its input.
        may_run: whether it may start processes, as llama.cpp's.

    Raises:
        Violation: it does not.
    """
    watching, before, start = watch(), _peak(), time.process_time()
    watching.seen, watching.allowed, watching.may_run = [], (str(folder.resolve()), str(folder)), may_run
    for kind, timer, limit in _TIMERS:
        signal.signal(kind, _too_long)
        signal.setitimer(timer, limit())
    try:
        yield
    finally:
        for _, timer, _ in _TIMERS:
            signal.setitimer(timer, 0)
        watching.allowed = None
    if watching.seen:
        raise Violation("touched", "; ".join(watching.seen[:3]), watching.seen[0].split(" ")[0])
    if (taken := time.process_time() - start) > SECONDS:
        raise Violation("hang", f"{taken:.1f} s")
    if (grown := _peak() - before) > FLOOR + times * size:
        raise Violation("memory", f"{grown >> 20} MiB for {size} bytes")


def check(read: Callable[[], object], folder: Path, size: int, times: int = TIMES) -> bool:
    """Read something and see that every property holds.

    Returns:
        Whether it was read without an error.

    Raises:
        Violation: a property does not hold.
    """
    try:
        with properties(folder, size, times):
            read()
    except SsmcError as error:
        check_message(str(error))
        return False
    except (Violation, KeyboardInterrupt):
        raise
    except BaseException as error:  # libraries in Rust panic with a class of their own, above Exception
        raise Violation("traceback", f"{type(error).__name__}: {str(error)[:300]}", _place(error)) from error
    return True


def check_message(text: str) -> None:
    """See that a message is one that can be printed on one line."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Violation("message", f"cannot be printed: {error}", text[:40]) from error
    if not text.isprintable():
        raise Violation("message", f"more than one line, or control characters: {text[:300]!r}", text[:40])
    if len(text) > LONGEST:
        raise Violation("message", f"{len(text)} characters: {text[:200]!r}", text[:40])
    if not text.strip() or text.rstrip()[-1] not in ".!?":
        raise Violation("message", f"no sentence: {text[-200:]!r}", text[:40])


def _too_long(*_: Any) -> None:
    raise Violation("hang", f"more than {SECONDS:g} s, or {WALL:g} s by the clock", _place(None))


def _peak() -> int:
    """Bytes of memory this process has had at most; getrusage counts what the one that started it had, too."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException | None) -> str:
    """Where in our code it happened."""
    frames = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack()
    ours = [f"{Path(f.filename).name}:{f.name}" for f in frames if "/tests/" not in f.filename and _is_ours(f.filename)]
    return f"{type(error).__name__} {ours[-1] if ours else ''}"


def _is_ours(name: str) -> bool:
    return (
        any(f"/{part}/" in name for part in ("runtime", "compressor", "exporters", "cli"))
        and "site-packages" not in name
    )
