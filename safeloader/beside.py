"""Every loader of a launched program, recorded from beside it. Runs in: main.

::

    iter(loader) ── hook ──► iterate ──► loader._get_iterator() ── hook ──► get_iterator
                                          (a subclass adds its own here)       │
                       LoaderHandle ◄── keywords, notebook, pool ──────────────┘

The class of a loader, its attributes and its pickles stay the program's own. What fails here before
the first batch is said once, and torch's own iterator serves. The program's own SafeDataLoaders are
left as they are, and listened to. At the end of each process a line for each loader says what was
recorded, and what was not and why.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from safeloader import _python, _torch
from safeloader.delivery.audit import EpochAudit
from safeloader.epochs import why_not_seedable
from safeloader.errors import SafeLoaderError
from safeloader.failures.failure import Failure
from safeloader.failures.loader_log import LoaderLog, say
from safeloader.handles import LoaderHandle, handle_of
from safeloader.instrumenting import why_not_recordable
from safeloader.introspect import warned
from safeloader.introspect.callers import calling_line
from safeloader.introspect.ranks import rank
from safeloader.introspect.signals import raised_by_signal
from safeloader.loader import SafeDataLoader, why_unrecorded
from safeloader.main.iterator import iterate as iterate_recorded
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.provenance.recorder import Recorder, Totals
from safeloader.provenance.summary import Figures, figures_of
from safeloader.settings import is_off

_TOLD_MAX = 50  # loaders at the end
_LOOKED_AT = 1 << 17  # samples of each, the newest, for the slowest: 0.1 s, of batches of one 0.4 s
_TOLD_APART = ("missing", "failed", "dropped", "skipped", "replaced")  # drawn, not delivered


class _Listener:
    """The sink of one epoch: has it summed up."""

    def __init__(self, line: _Line) -> None:
        self._line = line

    def begun(self, epoch: int, audit: Callable[[], EpochAudit]) -> None:
        """An epoch begins."""
        self._line.begins(self, audit)

    def audited(self, audit: EpochAudit) -> None:
        """It is closed."""
        self._line.ends(self, audit)

    def failed(self, failure: Failure) -> None:
        """An error is about to be raised."""
        self._line.failures += 1


class _Line:
    """What is said at the end of the loaders of one name that one line first iterated.

    The name is that of the log, ``DataLoader over ImageFolder (50000)``: one function often
    iterates the loaders for training and for validation. What is not recorded has its class alone.
    """

    def __init__(self, name: str, line: str) -> None:
        self.name, self.line = name, line
        self.why_not: list[str] = []
        self.unrecorded = 0
        self.epochs = self.drawn = self.delivered = self.failures = 0
        self.counts: dict[str, int] = {}
        self.unknown = 0
        self._open: dict[_Listener, Callable[[], EpochAudit]] = {}
        self._pid = os.getpid()
        self._watched: list[weakref.finalize[[dict[int, Any], Totals], Recorder]] = []
        self._figures: Figures | None = None

    def watch(self, recorder: Recorder) -> None:
        """Have it said what the loading cost; a loader may go before the program ends."""
        # It must hold neither the recorder nor anything that leads back to it.
        gone = weakref.finalize(recorder, self._cost, recorder.held, recorder.totals)
        gone.atexit = False
        self._watched = [each for each in self._watched if each.alive]
        self._watched.append(gone)

    def _cost(self, held: dict[int, Any], totals: Totals) -> None:
        if os.getpid() != self._pid or not held:
            return
        with _guarded():
            newest = figures_of([*held.values()], totals, FactsOfEpochs(1), _LOOKED_AT)
            self._figures = newest.and_of(self._figures)

    def begins(self, listener: _Listener, audit: Callable[[], EpochAudit]) -> None:
        """An epoch begins."""
        self._open[listener] = audit

    def ends(self, listener: _Listener, audit: EpochAudit) -> None:
        """Book what an epoch came to."""
        self._open.pop(listener, None)
        self.epochs += 1
        self.drawn += audit.drawn
        self.delivered += audit.delivered
        self.unknown += audit.ok is None
        for name, count in audit.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def left_out(self, why: str) -> None:
        """A loader, or an iterator, is not recorded."""
        self.unrecorded += 1
        if why not in self.why_not:
            self.why_not.append(why)

    def close(self) -> None:
        """The process ends: epochs that run still are booked as they stand."""
        for listener, audit in list(self._open.items()):
            self.ends(listener, audit())
        for watched in self._watched:
            watched()

    def __str__(self) -> str:
        if self.why_not:
            times = f", {self.unrecorded} times" if self.unrecorded > 1 else ""
            return f"NOT recorded: {self.name} at {self.line}{times}: {'; '.join(self.why_not)}"
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        said = f"{self.name} at {self.line}: {epochs}, {self.delivered} of {self.drawn} delivered"
        troubles = [
            f"{count} {name}"
            for name, count in self.counts.items()
            if count and name not in ("unvisited", "repeated")
        ]
        ahead = self.drawn - self.delivered - sum(self.counts.get(name, 0) for name in _TOLD_APART)
        if ahead > 0:
            troubles.append(f"{ahead} drawn ahead and not handed over")
        if self.unknown:
            troubles.append(f"{self.unknown} epochs not checked: a fault of safeloader's own")
        if self.failures:
            troubles.append("1 error raised" if self.failures == 1 else f"{self.failures} raised")
        said = f"{said}; {', '.join(troubles)}" if troubles else said
        if self._figures is None:
            return said
        return f"{said}\n    {'; '.join([self._figures.waiting, *self._figures.costs])}"


class _State:
    """What this process knows; a forked child has one of its own."""

    def __init__(self) -> None:
        told = json.loads(os.environ.get("SAFELOADER_LAUNCHED") or "{}")
        self.options: dict[str, Any] = told.get("options", {})
        self.lines: dict[tuple[str, str], _Line] = {}
        self.warned: set[str] = set()
        self.rank: int | None = None
        self.watched: weakref.WeakSet[Recorder] = weakref.WeakSet()
        self.lock = threading.RLock()  # two threads may iterate their first loaders at once
        self._begun = False

    def _begin(self) -> None:
        """Before the first epoch of this process: where it writes, and who speaks at its end."""
        self._begun = True
        self.rank = rank()  # at its end the process group may be gone
        warned.instead = say
        if multiprocessing.parent_process() is not None:  # these skip `atexit`
            _python.Finalize(None, _say, exitpriority=-100)
        else:
            atexit.register(_say)

    def line(self, name: str, at: str) -> _Line:
        with self.lock:
            if not self._begun:
                self._begin()
            return self.lines.setdefault((name, at), _Line(name, at))

    def say_once(self, why: str, more: str = "") -> None:
        """Why something is not recorded."""
        if why not in self.warned:
            self.warned.add(why)
            say(f"safeloader: {why}{more}")


_state = _State()
_torch.moved()  # looked at now, while torch's names are torch's: the program may change them


def _in_child() -> None:
    global _state
    _state = _State()


_python.at_fork(after_in_child=_in_child)


# what the hook asks ─────────────────────────────────────────────────────────────────────────────


def iterate(loader: Any, stock: Callable[[Any], Any]) -> Any:
    """What ``iter(loader)`` gives; ``stock`` is torch's own method."""
    return stock(loader) if _recorded(loader) is None else _torch.ask_for_iterator(loader)


def get_iterator(loader: Any, stock: Callable[[Any], Any]) -> Any:
    """What ``loader._get_iterator()`` gives."""
    handle = _recorded(loader)
    if handle is None:
        return stock(loader)
    try:
        return iterate_recorded(loader, handle)
    except SafeLoaderError:
        raise
    except Exception as exc:
        if raised_by_signal(exc):  # a time limit of the program's, say
            raise
        why = _fault(exc)
    iterator = stock(loader)  # what is torch's own error or the program's is raised here, as it is
    _leave(handle, why)
    return iterator


def made(kind: type, loader: Any) -> None:
    """An iterator of torch's is being made over ``loader``: by us, or by others behind us."""
    if isinstance(loader, _torch.LoaderView) or _out_of_reach() or handle_of(loader) is not None:
        return
    with _guarded():
        line = _state.line(type(loader).__qualname__, calling_line())
        its_own = f"it makes its own iterators ({kind.__qualname__})"
        line.left_out(why_unrecorded(loader.num_workers > 0) or its_own)


def listens(loader: DataLoader[Any], log: LoaderLog) -> _Listener | None:
    """Who listens to an epoch that begins: of a loader of ours, or of one from beside."""
    if _out_of_reach():
        return None
    handle = _handle(loader)
    line = _state.line(log.loader_name, handle.line)
    recorder = loader.recorder if isinstance(loader, SafeDataLoader) else handle.recorder
    if recorder is not None and recorder not in _state.watched:  # two loaders may share one
        _state.watched.add(recorder)
        line.watch(recorder)
    return _Listener(line)


def _recorded(loader: Any) -> LoaderHandle | None:
    """The handle of a loader; None where torch's own has to do, or the loader records itself."""
    if isinstance(loader, _torch.LoaderView | SafeDataLoader) or _out_of_reach():
        return None
    with _guarded():
        handle = _handle(loader)
        return None if handle.why_not else handle
    return None


def _out_of_reach() -> bool:
    """Whether nothing is recorded here: in a worker, and where we are off."""
    return get_worker_info() is not None or is_off()


def _handle(loader: DataLoader[Any]) -> LoaderHandle:
    handle = handle_of(loader)
    if handle is not None:
        return handle
    with _state.lock:
        handle = handle_of(loader)
        if handle is not None:
            return handle
        why = ""
        if not isinstance(loader, SafeDataLoader):  # whose records are its own
            why = why_not_recordable(loader) or why_unrecorded(loader.num_workers > 0)
        options, unseeded = _state.options, ""
        if not why and options.get("seed") is not None:
            per = options.get("seed_per", "sample")
            unseeded = why_not_seedable(loader, per, made_by_user=False)
        if unseeded:
            options = options | {"seed": None}
        handle = LoaderHandle(loader, options, calling_line(), Recorder())
        if unseeded:
            _state.say_once(unseeded, f". --seed does not serve {handle.kind} at {handle.line}")
        if why:
            _leave(handle, why)
        return handle


def _leave(handle: LoaderHandle, why: str) -> None:
    """Torch's own iterator serves this loader from now on; said once."""
    handle.why_not = why
    _state.line(handle.kind, handle.line).left_out(why)
    _state.say_once(why, f". Torch's own iterator serves: {handle.kind} at {handle.line}")


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """What is done within is ours: a fault of it is said once, and the program goes on."""
    try:
        yield
    except Exception as exc:
        if raised_by_signal(exc):
            raise
        _state.say_once(_fault(exc))


def _fault(exc: Exception) -> str:
    return f"safeloader failed ({type(exc).__name__}: {exc}); please report it"


def _say() -> None:
    """At the end of the process: what was recorded, and what was not."""
    for line in _state.lines.values():
        line.close()
    if not _state.lines:
        return
    lines = list(map(str, _state.lines.values()))
    more = [f"and {len(lines) - _TOLD_MAX} more"] if len(lines) > _TOLD_MAX else []
    rank = "" if _state.rank is None else f", rank {_state.rank}"
    heading = f"safeloader: loaders of process {os.getpid()}{rank}"
    say("\n  ".join([heading, *lines[:_TOLD_MAX], *more]))
    _state.lines.clear()
