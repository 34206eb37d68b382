"""A process before, during and after its death."""

from __future__ import annotations

import os
import signal

from safeloader.supervision.processes import is_dying, is_gone


def test_a_process_is_alive_then_dying_then_gone() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    assert (is_dying(pid), is_gone(pid)) == (False, False)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert (is_dying(pid), is_gone(pid)) == (True, False)
    os.waitpid(pid, 0)
    assert (is_dying(pid), is_gone(pid)) == (False, True)


def test_another_users_process_is_there() -> None:
    assert not is_gone(1)
