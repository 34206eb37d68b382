"""Whether an exception is that of a signal handler, which only struck here. Runs in: both."""

from __future__ import annotations

import signal
import traceback as traceback_module
import types


def raised_by_signal(exc: BaseException) -> types.FrameType | None:
    """The frame in which a signal handler struck that raised this; None where none did.

    It may be a time limit of the user's. What it struck is not at fault.
    """
    if exc.__traceback__ is None or exc.__traceback__.tb_next is None:
        return None  # it was raised where it was caught, and 64 handlers need not be asked for
    handlers = map(signal.getsignal, signal.valid_signals())
    codes = {getattr(each, "__code__", None) for each in handlers}
    struck = None
    for frame, _ in traceback_module.walk_tb(exc.__traceback__):
        if frame.f_code in codes:
            return struck
        struck = frame
    return None
