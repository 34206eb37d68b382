"""Forks are noticed by whoever lent memory meanwhile, at whatever moment of the fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What is registered first runs last: between safeloader's hook and the fork itself, where another
# thread may lend a batch. The child sees it, so it must not be taken for one lent afterwards.
LENT_WHILE_FORKING = """
import os
noted = []
os.register_at_fork(before=lambda: noted.append(forks.forks_noticed()))
from safeloader.transport import forks
forks.notice_forks()
before = forks.forks_noticed()
child = os.fork()
if not child:
    os._exit(0)
os.waitpid(child, 0)
print(before < noted[0] < forks.forks_noticed())
"""


def test_what_is_lent_while_the_process_forks_is_seen_by_the_child() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LENT_WHILE_FORKING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
