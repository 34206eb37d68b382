"""A signal handler that raises, at every moment in turn at which one can run.

The interpreter runs handlers after a call of a function in C, at the start of a function, and when
a loop goes back. Where the tracing of opcodes stands just behind one of these, it raises.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_AFTER = ("CALL", "RESUME", "JUMP_BACKWARD", "FOR_ITER", "BINARY_", "STORE_SUBSCR")
# Not behind PRECALL, of Python 3.11: the call is still to come.
_FINALIZERS = ("__del__", "given_back")  # what is raised there is printed, and goes nowhere
_NEVER = ("JUMP_BACKWARD_NO_INTERRUPT",)


class Interrupt(BaseException):
    """As ``KeyboardInterrupt``, and of nobody else."""


class _Bomb:
    """Raises at the ``due``-th moment in code of these files."""

    def __init__(self, due: int, files: tuple[str, ...]) -> None:
        self._left = due
        self._files = files
        self._before: dict[FrameType, str] = {}
        self._names: dict[Any, dict[int, str]] = {}
        self.went_off = False
        self.at = ""

    def called(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_back is not None:
            self._before.pop(frame.f_back, None)  # a function in Python: no moment after it
        code = frame.f_code
        if not code.co_filename.endswith(self._files) or code.co_name in _FINALIZERS:
            return None
        frame.f_trace = self._stepped  # from 3.13 on, opcodes of a frame that has one are traced
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._stepped

    def _stepped(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            code = frame.f_code
            if code not in self._names:
                self._names[code] = {at.offset: at.opname for at in dis.get_instructions(code)}
            before = self._before.get(frame, "")
            self._before[frame] = self._names[code].get(frame.f_lasti, "CACHE")
            if before.startswith(_AFTER) and before not in _NEVER:
                self._left -= 1
                if self._left < 0:
                    self.went_off = True
                    sys.settrace(None)
                    self.at = f"{code.co_qualname}:{frame.f_lineno} after {before}"
                    self._before.clear()
                    raise Interrupt
        elif event == "return":
            self._before.pop(frame, None)
        return self._stepped


def at_every_moment(
    deed: Callable[[], Any], *files: str, most: int = 5000
) -> Iterator[Callable[[], Any]]:
    """``deed`` again and again, each time interrupted at a later moment, until there is none.

    What is yielded calls ``deed`` until it is not interrupted any more.
    """
    for due in range(most):
        bomb = _Bomb(due, files)
        before = sys.gettrace()  # coverage has one

        def run(bomb: _Bomb = bomb, before: Any = before) -> Any:
            while True:
                if not bomb.went_off:
                    sys._getframe().f_trace_opcodes = True  # 3.12: before the tracing begins
                    sys.settrace(bomb.called)
                try:
                    return deed()
                except Interrupt:
                    continue
                finally:
                    sys.settrace(before)

        yield run
        if not bomb.went_off:
            return
    raise AssertionError(f"more than {most} moments")
