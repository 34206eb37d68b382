"""Forks are noticed before they happen, and once more after: threads go on meanwhile."""

from __future__ import annotations

import subprocess
import sys

_OPENED_MEANWHILE = """
import os

meanwhile = []
# The first hook registered is the last one called: after ours, right before the fork.
os.register_at_fork(before=lambda: [each() for each in meanwhile])

from safeloader.transport.slot_table import GONE
from tests.wired import MB, Wired, filled

wired, held = Wired(), []
meanwhile.append(lambda: held.append(wired.send(filled(MB, 1))))
if not (pid := os.fork()):
    os._exit(0)
os.waitpid(pid, 0)
held.clear()
assert wired.states == [GONE], wired.states
"""


def test_a_batch_that_another_thread_opens_while_a_fork_is_prepared_is_a_childs_too() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _OPENED_MEANWHILE], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
