"""The process that is examined in, from both of its ends. Runs in: main.

::

    Following (here)  ◄── facts: a line of JSON each ───┐
                      ◄── output: what is printed ──────┤ child: a session of its own
                      ◄── stacks: faulthandler's ───────┘   looks, and the workers they start

The child is forked where that is sound, else a fresh Python gets the loader's parts by pickle. It
may hang, kill itself, print without end or start processes of its own: whatever it does, it is
ended as a group at its time, and the looks that it did not come to are made by the next child.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import pickle
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable
from itertools import dropwhile, takewhile
from traceback import format_list
from typing import Any, NamedTuple

import torch

from safeloader import _python
from safeloader.examining.looks import look_all, search_again
from safeloader.examining.patience import Patience, is_fetching
from safeloader.examining.stuck import is_deadlocked, processor_s
from safeloader.examining.subject import Subject, pickled_alone
from safeloader.examining.talk import Order, Source, Talk
from safeloader.supervision import stacks

_KEPT_BYTES = 4096  # of what the child prints: the newest
EXAMINED = "_SAFELOADER_EXAMINED"  # in the environment of a child and of what it starts
CALLED_AGAIN = (
    "safeloader: spawn imported the program once more, and it called doctor again: put the call "
    'under `if __name__ == "__main__":`'
)
_GUARDS = (b"bootstrapping phase", CALLED_AGAIN.encode())  # what multiprocessing says, and we
_LOOK_S = 0.05  # how often it is looked whether the child lives
_BY_ITSELF_S = 0.5  # a child that has said all is left to end by itself for so long
_ANSWER_S = 0.5  # how long a stack is waited for
_SAMPLED_S = 1.0  # how often it is looked how much of a processor a silent child uses
_BUSY = 0.05  # of the time: on a loaded machine it may be little
_ASKED = signal.SIGUSR2 if hasattr(signal, "SIGUSR2") else None
_OURS = os.path.join("safeloader", "examining", "")
# The files by way of which a worker comes to the user's code.
_STARTING = re.compile(r"[/\\](multiprocessing|torch[/\\]utils[/\\]data)[/\\]")
_LATE_S = 5.0  # past its time an orphaned child ends itself

# ── the child's end


def _examine(source: Source, order: Order, facts: int, output: int, stack: int) -> None:
    """The child's life; it does not return."""
    try:
        if os.getsid(0) != os.getpid():
            os.setsid()
        os.environ[EXAMINED] = "1"
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        faulthandler.enable(stack)
        if _ASKED is not None:
            faulthandler.register(_ASKED, stack, all_threads=False)
        late = order.end - time.monotonic() + _LATE_S
        faulthandler.dump_traceback_later(max(1.0, late), exit=True, file=stack)
        torch.set_num_threads(1)  # as in a worker; with more, a forked child may hang in OpenMP
        talk = Talk(facts, order.end, order.samples, order.avoided)
        if order.suspects:
            search_again(source, talk, order)
        else:
            look_all(_Ending(source, order.samples_end), talk, order.first, order.excluded)
        talk.done()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)
    except BaseException as exc:
        traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        # The status with which it would have ended a process of the user's.
        asked = exc.code if isinstance(exc, SystemExit) else 1
        os._exit((asked & 0xFF) if isinstance(asked, int) else 0 if asked is None else 1)


def main(facts: int, output: int, stack: int, payload: int) -> None:
    """The beginning of a fresh Python: like one of multiprocessing's, with pipes of ours."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    with os.fdopen(payload, "rb") as file:
        preparation, content, order = pickle.load(file)
    _python.prepare_spawned(preparation)
    _examine(_Unpickling(content), Order(*order), facts, output, stack)


class _Ending:
    """A source whose samples are known to end earlier than the length says."""

    def __init__(self, source: Source, end: int | None) -> None:
        self._source, self._end = source, end

    def __call__(self) -> Subject:
        subject = self._source()
        subject.end = self._end
        return subject


class _Unpickling:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __call__(self) -> Subject:
        return Subject.unpickled(self._content)


class _Passed:
    """A descriptor that a started process inherits under its own number."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def detach(self) -> int:
        return self._fd


# ── this end


class Step(NamedTuple):
    """Where a child was: the number of the look, what it did, and with which index (``place``)."""

    look: int
    what: str
    place: str | None


class Outcome(NamedTuple):
    """How a child ended.

    Attributes:
        how: ``"done"``, ``"died"``, ``"hung"``, ``"slow"`` (nothing came, and it may well be that
            it would) or ``"ended"`` (all time was up).
        at: where it was.
        seconds: how long it had been there.
        code: its exit code, as :mod:`subprocess` has it; None if it was ended from here.
        stack: where its Python was; empty if that is not known.
        samples: how many may be fetched still.
        suspects: what was being fetched where ``at`` names no index; empty if that is not known.
        excluded: indices that it told not to come; ``samples_end``, if the length is not true.
        cold: whether no sample had come in this child.
        rest_left: whether it left the look it was at to another.
        busy: of the time without a word, the share of a processor that was used.
        all_came_alone: False where ``suspects`` were tried one by one, and not to the last.
    """

    how: str
    at: Step
    seconds: float
    code: int | None
    stack: str
    samples: int
    suspects: str = ""
    excluded: frozenset[str] = frozenset()
    samples_end: int | None = None
    cold: bool = False
    rest_left: bool = False
    busy: float = 0.0
    all_came_alone: bool = True


class Output:
    """What was printed: how much, and the end of it.

    ``lacks_guard``: multiprocessing said that the program starts processes when it is imported.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.lacks_guard = False
        self._tail = b""

    def add(self, data: bytes) -> None:
        """More of it."""
        self.bytes += len(data)
        self._tail = (self._tail + data)[-_KEPT_BYTES:]

        self.lacks_guard |= any(each in self._tail for each in _GUARDS)

    @property
    def tail(self) -> str:
        """The end, as text."""
        return self._tail.decode("utf-8", "replace")


def can_fork() -> bool:
    """Whether a forked child can do all that this process could."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return False
    return not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def follow(
    source: Source,
    order: Order,
    patience: Patience,
    heard: Callable[[int, str, dict[str, Any]], None],
    output: Output,
) -> Outcome:
    """Start a child, forked, and follow it to its end.

    Args:
        source: gives the subject, in the child.
        order: what it is to do.
        patience: for how long it may be without a word.
        heard: called with each fact: number of the look, kind, and the fact.
        output: is given what the child prints.
    """
    with _Pipes() as pipes:
        context: Any = multiprocessing.get_context("fork")
        process = context.Process(target=_examine, args=(source, order, *pipes.far), daemon=False)
        with warnings.catch_warnings():
            # Of forks beside threads: the child can hang, and is ended then.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        pipes.close_far()
        try:
            return _Following(process.pid, pipes, order, patience, heard, output).to_the_end()
        finally:
            process.join(5.0)
            with contextlib.suppress(ValueError):  # it cannot be killed: the kernel waits in it
                process.close()


def follow_spawned(
    subject: Subject,
    order: Order,
    patience: Patience,
    heard: Callable[[int, str, dict[str, Any]], None],
    output: Output,
) -> Outcome:
    """The same in a fresh Python, that is given the subject by pickle.

    Raises:
        Exception: whatever the parts of the subject raise, if they cannot be pickled.
    """
    with _Pipes() as pipes, tempfile.TemporaryFile() as file:
        passed: list[int] = [*pipes.far, file.fileno()]

        def pass_on(fd: int) -> int:
            copy = os.dup(fd)
            pipes.more.append(copy)
            passed.append(copy)
            return copy

        popen: Any = types.SimpleNamespace(duplicate_for_child=pass_on, DupFd=_Passed)
        with _python.as_if_spawning(popen):
            content = subject.pickled()
            preparation = _python.spawn_preparation()
            file.write(pickled_alone((preparation, content, tuple(order))))
        file.seek(0)
        begin = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from safeloader.examining.child import main; "
            f"main{(*pipes.far, file.fileno())}"
        )
        process = subprocess.Popen(  # noqa: S603  # this Python, and words of ours
            [sys.executable, "-c", begin],
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        pipes.close_far()
        try:
            return _Following(process.pid, pipes, order, patience, heard, output).to_the_end()
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)


class _Pipes:
    """Three, for facts, output and stacks; ``near`` are read here, ``far`` are the child's."""

    def __init__(self) -> None:
        pairs = [os.pipe() for _ in range(3)]
        self.near = [pair[0] for pair in pairs]
        self.far = [pair[1] for pair in pairs]
        self.more: list[int] = []
        for fd in self.near:
            os.set_blocking(fd, False)

    def __enter__(self) -> _Pipes:
        return self

    def close_far(self) -> None:
        for fd in (*self.far, *self.more):
            os.close(fd)
        self.far, self.more = [], []

    def __exit__(self, *exc: object) -> None:
        self.close_far()
        for fd in self.near:
            os.close(fd)


class _Following:
    def __init__(
        self,
        pid: int,
        pipes: _Pipes,
        order: Order,
        patience: Patience,
        heard: Callable[[int, str, dict[str, Any]], None],
        output: Output,
    ) -> None:
        self._pid, self._order, self._patience = pid, order, patience
        self._facts, self._output_fd, self._stacks = pipes.near
        self._heard, self._output = heard, output
        self._at = Step(order.first, "starting", None)
        self._since = time.monotonic()
        self._rest = b""
        self._stack = b""
        self._samples = order.samples
        self._suspects = ""
        self._excluded: frozenset[str] = frozenset()
        self._samples_end: int | None = None
        self._cold = True
        self._rest_left = False
        self._done = False
        self._used: list[tuple[float, float]] = []  # when, and how much of a processor by then

    def to_the_end(self) -> Outcome:
        """Follow the child until it has ended, by itself or from here."""
        how: str = "ended"
        with selectors.DefaultSelector() as waiting:
            for fd in (self._facts, self._output_fd, self._stacks):
                waiting.register(fd, selectors.EVENT_READ)
            try:
                how = self._follow(waiting)
                while how in ("hung", "slow") and self._answers(waiting):
                    how = self._follow(waiting)  # what came to an answer after all is no hang
                seconds = time.monotonic() - self._since
                if how == "ended":
                    self._ask(waiting)
            finally:
                code = self._finish(ended_here=how != "died")
        return Outcome(
            how,
            self._at,
            seconds,
            code,
            _users(self._stack),
            self._samples,
            self._suspects,
            self._excluded,
            self._samples_end,
            self._cold,
            self._rest_left,
            self._busy,
        )

    def _answers(self, waiting: selectors.BaseSelector) -> bool:
        """Whether it says something while it is asked where it is."""
        since = self._since
        self._ask(waiting)
        if self._since == since:
            return False
        self._stack = b""
        return True

    def _follow(self, waiting: selectors.BaseSelector) -> str:
        while True:
            self._read(waiting, _LOOK_S)
            now = time.monotonic()
            if self._done:
                return "done"
            if self._is_dead():
                self._read(waiting, 0.0)
                return "done" if self._done else "died"
            waited = now - self._since
            if waited > _SAMPLED_S:
                self._sample(now)
            if now >= self._order.end:
                if waited > self._patience.at_the_end(self._at.what):
                    return self._hung_or_slow()
                return "ended"
            if waited > self._patience.of(self._at.what, cold=self._cold):
                how = self._hung_or_slow()
                if how == "hung" or not self._is_worth_waiting():
                    return how

    # ── what says nothing

    def _sample(self, now: float) -> None:
        """Look how much of a processor it has used, about once a second."""
        if self._used and self._used[0][0] < self._since:
            self._used.clear()
        if not self._used or now - self._used[-1][0] > _SAMPLED_S:
            self._used.append((now, processor_s([self._pid, *_descendants(self._pid)])))

    @property
    def _busy(self) -> float:
        """The share of a processor that was used of late: in the last third of the silence."""
        if len(self._used) < 2 or self._used[0][0] < self._since:
            return 0.0
        last, used = self._used[-1]
        since = last - max(_SAMPLED_S, (last - self._since) / 3)
        then, before = next(each for each in self._used if each[0] >= since or each[0] == last)
        if then == last:
            then, before = self._used[-2]
        return max(0.0, used - before) / (last - then)

    def _hung_or_slow(self) -> str:
        """What begins may take long: of that only what cannot come to an end is called a hang."""
        what = self._at.what
        if not (_begins_workers(what) or (is_fetching(what) and self._patience.nothing_came)):
            return "hung"
        if self._busy > _BUSY:
            return "slow"
        processes = _descendants(self._pid) if _begins_workers(what) else []
        return "hung" if any(map(is_deadlocked, processes or [self._pid])) else "slow"

    def _is_worth_waiting(self) -> bool:
        """Whether to go on until all time is up, where it may only be slow.

        Where no sample came yet, no other look would do better; but workers that are not at work
        may come to something if they are started in another way.
        """
        return not _begins_workers(self._at.what) or self._busy > _BUSY

    def _read(self, waiting: selectors.BaseSelector, seconds: float) -> None:
        for key, _ in waiting.select(seconds):
            data = self._all_of(key.fd)
            if not data:
                waiting.unregister(key.fd)
            elif key.fd == self._facts:
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        self._hear(json.loads(line))
            elif key.fd == self._stacks:
                self._stack = (self._stack + data)[-(1 << 16) :]
            else:
                self._output.add(data)
        if not waiting.get_map() and seconds:
            time.sleep(seconds)  # the child has closed them all

    def _all_of(self, fd: int) -> bytes:
        data = b""
        with contextlib.suppress(BlockingIOError):
            while len(data) < (1 << 22):  # of a child that prints without end: the rest later
                more = os.read(fd, 1 << 16)
                if not more:
                    break
                data += more
        return data

    def _hear(self, message: list[Any]) -> None:
        what, *rest = message
        now = time.monotonic()
        self._patience.answered(self._at.what, now - self._since)
        if what == "fact":
            self._heard(self._at.look, rest[0], rest[1])
        elif what == "look":
            self._at, self._suspects = Step(int(rest[0]), "", None), ""
        elif what == "known":
            self._excluded, self._samples_end = frozenset(rest[0]), rest[1]
        elif what == "rest":
            self._rest_left = True
        elif what == "suspects":
            self._suspects = rest[0]
        elif what == "at":
            self._cold &= not is_fetching(self._at.what)
            self._at = self._at._replace(what=rest[0], place=rest[1])
        elif what == "done":
            self._samples, self._done = int(rest[0]), True
        self._since = now

    def _is_dead(self) -> bool:
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            import psutil

            with contextlib.suppress(psutil.NoSuchProcess):
                return bool(psutil.Process(self._pid).status() == psutil.STATUS_ZOMBIE)
            return True
        try:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._pid, flags) is not None
        except ChildProcessError:  # somebody waits for all children of this process
            return True

    def _ask(self, waiting: selectors.BaseSelector) -> None:
        """Where it is: the handler is in C, and answers from a call that never ends too."""
        if _ASKED is None:
            return
        # Forked workers answer in the child's way; it is they who hang, and not who waits for them.
        workers = _descendants(self._pid) if self._at.what.endswith("by fork") else []
        with contextlib.suppress(OSError):
            os.kill((workers or [self._pid])[0], _ASKED)
        end = time.monotonic() + _ANSWER_S
        known = -1
        while len(self._stack) != known and time.monotonic() < end:  # until no more comes
            known = len(self._stack) or known
            self._read(waiting, _LOOK_S)

    def _finish(self, *, ended_here: bool) -> int | None:
        """End the child and all that it started; its exit code if it ended by itself.

        It is not reaped yet, so that its number, and its group's, are nobody else's.
        """
        theirs = _descendants(self._pid)
        end = time.monotonic() + _BY_ITSELF_S
        while self._done and not self._is_dead() and time.monotonic() < end:
            time.sleep(0.005)
        _end_but_trackers({self._pid, *theirs, *_in_session(self._pid)})
        for pid in (self._pid, *theirs):
            with contextlib.suppress(OSError):
                leads = os.getpgid(pid) == pid and pid != os.getpgid(0)
                (os.killpg if leads else os.kill)(pid, signal.SIGKILL)
        if ended_here or not hasattr(os, "waitid"):
            return None
        try:
            found = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return None
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _begins_workers(what: str) -> bool:
    return what.startswith("starting") and "worker" in what


def _users(dump: bytes) -> str:
    """The part of a stack that is the user's, the newest frame last; all of it if there is none."""
    if not dump:
        return ""
    whole = stacks.read(dump.decode("utf-8", "replace"))
    frames = [*takewhile(lambda frame: _OURS not in frame.filename, whole.frames)]
    theirs = [*dropwhile(lambda frame: _STARTING.search(frame.filename), frames[::-1])]
    return "".join(format_list(theirs or frames[::-1])).rstrip() or whole.text


def _end_but_trackers(pids: set[int]) -> None:
    """End processes, and have those that remove what the others left in shared memory do so.

    Under spawn semaphores have names. Who tracks them ends by itself when all the others have.
    """
    import psutil

    trackers: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if any("resource_tracker" in word for word in process.cmdline()):
                trackers.append(process)
            elif pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(trackers, timeout=_BY_ITSELF_S)


def _in_session(leader: int) -> list[int]:
    """The processes of a session, whoever their parent is by now."""
    import psutil

    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == leader:
                found.append(pid)
    return found


def _descendants(pid: int) -> list[int]:
    """The processes that it started, those in sessions of their own too."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return [each.pid for each in psutil.Process(pid).children(recursive=True)]
    return []
