"""The Python stacks of workers, asked for or left behind. Runs in: main.

A worker writes its stacks in a signal handler in C (``faulthandler``), so it answers also while it
is stuck in C code. Only workers that are stuck are asked; the training process takes no signal.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from itertools import takewhile
from traceback import FrameSummary, format_list
from typing import NamedTuple

from safeloader.supervision.flight_recorder import STACK_BYTES, FlightRecorder
from safeloader.supervision.processes import Signals

_ANSWER_S = 1.0  # how long an answer is waited for
_QUIET_S = 0.03  # without a new line, it is complete
_DUMP_BYTES = 1 << 16  # more than one answer takes
# "Stack" is that of the only thread there is.
_CURRENT_THREAD = re.compile(
    r"^(Current thread .*|Stack) \(most recent call first\):\n(?P<frames>( .*\n?)*)", re.MULTILINE
)
_FRAME = re.compile(r'^ +File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_OURS = os.path.join("safeloader", "worker", "")
_FRAMES_MAX = 40


class Stack(NamedTuple):
    """A worker's main thread, newest frame first, and the text of it all."""

    frames: tuple[FrameSummary, ...]
    text: str


def asked(
    flight: FlightRecorder, signals: Sequence[Signals], workers: Iterable[int]
) -> dict[int, Stack]:
    """The stacks of these workers as they are now, without those that do not answer."""
    before: dict[int, int] = {}
    for worker in workers:
        written = len(flight.stacks(worker).encode())
        # The number alone is believed: a broken native library may have written over the rest.
        if written + _DUMP_BYTES < STACK_BYTES and signals[worker].send(flight.read(worker).signal):
            before[worker] = written
    give_up = time.monotonic() + _ANSWER_S
    told = dict.fromkeys(before, "")
    changed = time.monotonic()
    while time.monotonic() < give_up:
        time.sleep(0.005)
        now = {worker: flight.stacks(worker, after=at) for worker, at in before.items()}
        if now != told:
            told, changed = now, time.monotonic()
        elif all(told.values()) and time.monotonic() - changed > _QUIET_S:
            break
    return {worker: read(text) for worker, text in told.items() if text}


def left_behind(flight: FlightRecorder, worker: int) -> Stack:
    """What a dead worker wrote last; empty if it could not."""
    text = flight.stacks(worker)
    # A dump begins with "Fatal Python error"; what stands before it was asked for earlier.
    begins = max(text.rfind("Fatal Python error"), text.rfind("Traceback (most recent call last)"))
    return read(text[begins:]) if begins >= 0 else Stack((), "")


def read(text: str) -> Stack:
    """Take a dump of ``faulthandler`` apart; other text (a traceback) is kept as it is."""
    thread = _CURRENT_THREAD.search(text)
    found = [] if thread is None else _FRAME.findall(thread["frames"])
    current = [FrameSummary(file, int(line), name) for file, line, name in found]
    # Below the first of ours they are safeloader's, torch's and multiprocessing's.
    users = [*takewhile(lambda frame: _OURS not in frame.filename, current)]
    frames = tuple(users or current)[:_FRAMES_MAX]
    if not frames:
        return Stack((), text.strip())
    return Stack(frames, "".join(format_list(frames[::-1])).rstrip())
