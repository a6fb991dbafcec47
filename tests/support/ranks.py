"""Several processes at one piece of work, as torchrun would start them, without its seconds: forks of this process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence

from ssmc.runtime.errors import SsmcError

REFUSED, BROKEN = 5, 9  # exit codes of a child: in a sentence of ours, in a traceback


def child_code(work: Callable[[], object]) -> tuple[int, str]:
    """As `child`, in this process."""
    try:
        return 0, str(work())
    except SsmcError as error:
        return REFUSED, str(error)
    except BaseException:
        return BROKEN, traceback.format_exc()


def child(work: Callable[[], object]) -> tuple[int, str]:
    """Run something in a process of its own: its exit code, negative for a signal, and what it said."""
    return children([work])[0]


def children(works: Sequence[Callable[[], object]]) -> list[tuple[int, str]]:
    """As `child`, of several that begin together."""
    begun = []
    waiting, starting = os.pipe()
    for work in works:
        reading, saying = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(starting)
            os.read(waiting, 1)  # until the other end is closed
            code, said = child_code(work)
            os.write(saying, said.encode()[-3000:])
            os._exit(code)
        os.close(saying)
        begun.append((pid, reading))
    os.close(starting)
    os.close(waiting)
    ended = []
    for pid, reading in begun:
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        ended.append((os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said))
    return ended


def in_ranks(count: int, work: Callable[[], object]) -> bool:
    """Run something in so many processes that share it; whether all of them came to an end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "here"}
    pids = []
    for number in range(count):
        if (pid := os.fork()) == 0:
            os.environ.update(where, RANK=str(number), LOCAL_RANK=str(number))
            code, said = child_code(work)
            if code:
                sys.stderr.write(said)
            os._exit(code)
        pids.append(pid)
    for _ in range(count):
        pid, status = os.wait()
        if status:
            for other in set(pids) - {pid}:
                os.kill(other, signal.SIGKILL)
            return False
    return True
