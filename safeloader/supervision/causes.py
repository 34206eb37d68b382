"""The probable cause of a worker's death or silence. Runs in: main.

Signals and exit codes say little by themselves; with the phase, the stack and the machine's own
counters they mostly leave one explanation, and that is said first.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from traceback import FrameSummary
from typing import Any, NamedTuple

from safeloader.introspect.advice import aliases, library_called, without_threads
from safeloader.introspect.frames import is_users
from safeloader.introspect.resource_exhaustion import bus_error
from safeloader.introspect.resources import machine_memory
from safeloader.introspect.suspects import Inherited
from safeloader.introspect.texts import index_text
from safeloader.supervision.stacks import Stack

_LITTLE_SHARE = 0.05  # of the machine's memory


class WorkerEnd(NamedTuple):
    """How a worker ended.

    Attributes:
        exit_code: as :mod:`multiprocessing` has it: negative for a signal; None if unknown.
        phase: what it was doing, one of ``flight_recorder.PHASES``.
        index: the sample it was at, where that is known.
        stack: what it left behind.
        oom_killed: how many processes the kernel killed for memory since the workers started.
        grown_bytes: how much its resident memory grew.
        of_stream: whether ``index`` is (worker, ordinal) in a stream; a map-style dataset's sampler
            may yield pairs too.
    """

    exit_code: int | None
    phase: str
    index: Any
    stack: Stack
    oom_killed: int
    grown_bytes: int
    of_stream: bool = False


class Pace(NamedTuple):
    """How fast a worker fetches the samples of its batch.

    Attributes:
        came: samples that were fetched.
        wanted: samples of the batch.
        took_s: seconds that these took.
        since_s: seconds for which it is at the next.
    """

    came: int
    wanted: int
    took_s: float
    since_s: float

    @property
    def each_s(self) -> float:
        """Seconds a sample."""
        return self.took_s / self.came

    @property
    def whole_s(self) -> float:
        """Seconds that the batch takes at this pace."""
        return self.each_s * self.wanted

    @property
    def goes_on(self) -> bool:
        """Whether the sample it is at has not taken much longer than those before."""
        return self.since_s < 3 * self.each_s


class Forked(NamedTuple):
    """What the training process had when its workers were forked, and they do not have alive.

    Attributes:
        inherited: what was warned of.
        natives: gives other objects of libraries, of which too little is known for a warning.
        threads: names of threads, by the library that they are of.
    """

    inherited: tuple[Inherited, ...] = ()
    natives: Callable[[], Sequence[Inherited]] = tuple
    threads: Mapping[str, tuple[str, ...]] = types.MappingProxyType({})


def _name(number: int) -> str:
    names = {each.value: each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")  # a real-time signal has none


def ended(exit_code: int | None) -> str:
    """``"was killed by SIGKILL (signal 9)"``, ``"exited with code 3"``."""
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    name, number = _name(-exit_code), f"signal {-exit_code}"
    return f"was killed by {name}" + ("" if name == number else f" ({number})")


def of_death(end: WorkerEnd) -> str:
    """The probable cause of a worker's end, and what to do, in one or two sentences."""
    at = "" if end.index is None else f" at index {index_text(end.index)}"
    if "SystemExit" in end.stack.text:
        return (
            f"sys.exit() was called in the worker{at}; the stack shows where. Raise an exception "
            "there instead: it arrives here with its index"
        )
    if "KeyboardInterrupt" in end.stack.text:
        return "the worker was interrupted (Ctrl-C, or SIGINT sent to it alone)"
    if end.exit_code is not None and end.exit_code < 0:
        return _of_signal(_name(-end.exit_code), end, at)
    if end.phase == "starting":
        return (
            "it ended before it could report anything; what it printed stands above. Under spawn "
            "and forkserver the usual causes: a script without `if __name__ == '__main__':` around "
            "what it runs, or a dataset class that a fresh process cannot import (defined in a "
            "notebook or in __main__): move it into a module"
        )
    return (
        f"something ended the process{at} without an exception: os._exit(), or exit() called by a "
        f"native library. Search the dataset and what it calls; {_again(end)}"
    )


def _again(end: WorkerEnd, options: str = "") -> str:
    """How to have it happen again where nothing else is lost."""
    index = end.index
    python = f" (python{options})" if options else ""
    if index is None:
        return f"run the same in the main process with num_workers=0{python}"
    if end.of_stream:
        return (
            f"iterating worker {index[0]}'s part of the dataset up to sample {index[1]} (from 0) "
            f"in a fresh process{python} repeats it"
        )
    return f"loader.dataset[{index_text(index)}] in a fresh process{python} repeats it"


# What a signal says by itself; of the faults with ``{at}``, an index, and ``{line}``, the user's.
_ASKED = (
    "somebody asked it to end: a batch system that stops the job, a supervisor, or kill. Look at "
    "what sent the signal"
)
_SENT = dict.fromkeys(("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT"), _ASKED)
_SENT["SIGXCPU"] = _SENT["SIGXFSZ"] = "it ran into a limit of the shell (ulimit -t, ulimit -f)"
_FAULT = "a native library is at fault{at}{line}"
_FAULTS = {
    **dict.fromkeys(("SIGSEGV", "SIGFPE", "SIGSYS", "SIGTRAP"), _FAULT),
    "SIGABRT": "a native library gave up{at} (abort(), a failed assertion, corrupted memory){line}",
    "SIGILL": "a native library used an instruction that this processor lacks{line}: install a "
    "build for it",
}


def _of_signal(name: str, end: WorkerEnd, at: str) -> str:
    if name == "SIGKILL":
        return _of_sigkill(end)
    if name == "SIGBUS":
        return bus_error(at, f"; {_again(end)}")
    if name in _SENT:
        return _SENT[name]
    if name not in _FAULTS:
        return (
            f"somebody sent {name}, which ends a process that has no handler for it: a batch "
            "system that warns of the end of a job, or kill. Handle it in worker_init_fn, or have "
            "it sent to the training process alone"
        )
    top = next(iter(end.stack.frames), None)
    line = f", called from {top.filename}:{top.lineno} in {top.name}" if top else ""
    reason = _FAULTS[name].format(at=at, line=line)
    again = _again(end, " -X faulthandler")
    return f"{reason}. Look at that sample's data first, then at the library's version; {again}"


def _of_sigkill(end: WorkerEnd) -> str:
    fewer = (
        "use fewer workers, a smaller prefetch_factor or batch_size, or keep less in the dataset "
        "(numpy arrays instead of lists of objects: these are copied into every worker as they "
        "are read)"
    )
    if end.oom_killed > 0:
        return (
            f"out of memory: since the workers started the kernel killed {end.oom_killed} "
            f"process(es) for memory. Give it more, or {fewer}"
        )
    memory = machine_memory()
    low = memory and memory.available < _LITTLE_SHARE * memory.total
    if low or end.grown_bytes > 1 << 30:
        return f"probably out of memory: {fewer}. `dmesg | grep -i oom` tells for certain"
    return (
        "the kernel counted no out-of-memory kill here, so it was probably killed from outside: "
        "kill -9, a batch system's or container's limit (its log tells), or a watchdog. "
        "`dmesg | grep -i oom` rules out memory"
    )


def _line_in(frames: Sequence[FrameSummary]) -> str:
    """Where the user's code is; and what it called there, if it is not at the top."""
    places = range(len(frames))
    own = (at for at in places if is_users(frames[at].filename))
    at = next(own, next((at for at in places if not _is_stdlib(frames[at].filename)), 0))
    line = f"{frames[at].filename}:{frames[at].lineno} in {frames[at].name}"
    if not at:
        return line
    called = frames[at - 1]
    return f"{line}, in {os.path.basename(called.filename)}:{called.lineno} {called.name}"


def _library_in(frames: Sequence[FrameSummary]) -> str:
    """The library with native code that is at the top of the stack; "" where none is known."""
    top = frames[0]
    if (found := _PACKAGE.search(top.filename)) is not None:
        package = found[1]
        known_native = package not in _SILENT and _is_native(package)
        return library_called(package) if known_native else ""
    if not is_users(top.filename):
        return ""
    known = _globals_of(top.filename)
    for name in re.findall(r"\b([A-Za-z_]\w*)\.", top.line or ""):
        module = known.get(name)
        package = name if module is None else str(getattr(module, "__name__", "")).partition(".")[0]
        if name in aliases() and module is None:
            return library_called(name)
        if type(module) is types.ModuleType and package not in _SILENT and _is_native(package):
            return library_called(package)
    return ""


_SILENT = ("torch", "numpy", "safeloader")  # at work in every program: their name tells nothing


def _globals_of(file: str) -> dict[str, Any]:
    """What a module of the user's calls things, as far as it is imported here too."""
    for module in list(sys.modules.values()):
        if type(module) is types.ModuleType and vars(module).get("__file__") == file:
            return vars(module)
    return {}


def _is_native(package: str) -> bool:
    """Whether compiled code of a package is loaded here."""
    return package in aliases() or any(
        name.partition(".")[0] == package
        and str(getattr(module, "__file__", "")).endswith((".so", ".pyd"))
        for name, module in list(sys.modules.items())
    )


def _is_stdlib(file: str) -> bool:
    third_party = "site-packages" in file or "dist-packages" in file
    return file.startswith("<frozen ") or (file.startswith(_STDLIB) and not third_party)


_STDLIB = os.path.join(os.path.dirname(os.__file__), "")
_PACKAGE = re.compile(r"[\\/](?:site|dist)-packages[\\/]([^\\/.]+)")
_LOCKISH = ("acquire", "lock", ".wait(", ".join(", "semaphore", "condition", ".get(")
# By the state of the process, or by the phase.
_HELD_UP = {
    "stopped": "the worker is stopped (SIGSTOP, or a debugger): kill -CONT lets it go on",
    "disk-sleep": "the worker waits in the kernel for a disk or network share that does not "
    "answer: look at the mount the sample is read from",
    "starting": "the worker does not get through its start: importing the script and unpickling "
    "the dataset; under spawn and forkserver this may take long for a large dataset",
}


def of_silence(
    stack: Stack | None,
    status: str | None,
    phase: str,
    index: Any,
    start_method: str,
    *,
    timeout: bool = True,
    forked: Forked | None = None,
    pace: Pace | None = None,
) -> str:
    """The probable cause of a worker's silence, and what to do, in one or two sentences.

    ``pace`` is that of the batch it is at, where samples of it came.
    ``forked`` is what the training process had when the worker was forked from it.
    """
    if phase == "unknown":
        return (
            "no worker is at work although batches are due: look for a worker_init_fn, sampler or "
            "library that replaces torch's worker loop"
        )
    if held_up := _HELD_UP.get(status or "") or _HELD_UP.get(phase):
        return held_up
    if pace is not None and pace.goes_on:
        longer = "give timeout= more than that" if timeout else "that is how long it takes"
        return (
            f"it is slow, and not stuck: {pace.came} of the {pace.wanted} samples of the batch "
            f"came, in {pace.each_s:.2g} s each, so the batch takes about {pace.whole_s:.2g} s: "
            f"{longer}; more workers, or a smaller batch, have batches come sooner"
        )
    if stack is None or not stack.frames:
        return "give timeout= a larger value if the sample is only slow"
    line = _line_in(stack.frames)
    top = stack.frames[0]
    waits = any(word in f"{top.name} {top.line}".lower() for word in _LOCKISH)
    forked = forked or Forked()
    if suspect := _suspect(stack, waits, forked.inherited):
        deadlock = (
            "it waits for a lock or thread at {}. A deadlock inherited through fork is likely"
        )
        begins = deadlock if suspect.is_waited_for else "it hangs at {}"
        return (
            f"{begins.format(line)}; first suspect: {suspect.path} ({suspect.kind}), as was warned "
            f"of at the start: {suspect.why}. {_sentence(suspect.advice)}"
        )
    if waits and start_method == "fork":
        held = f" (it had {_threads_text(forked.threads)})" if forked.threads else ""
        return (
            f"it waits for a lock at {line}. A deadlock inherited through fork is likely: a lock "
            f"that another thread of the training process{held} held when the worker was forked "
            "stays locked in the worker for ever. Make the lock in the worker (worker_init_fn), "
            "start threads after the workers, or use multiprocessing_context='forkserver'"
        )
    if waits:
        return f"it waits for a lock, queue or thread at {line}: see who is to release it"
    at = "" if index is None else f" for index {index_text(index)}"
    longer = "then wait longer by timeout=" if timeout else "timeout= would end this with an error"
    said = f"it is stuck, or only slow ({longer}), at {line}{at}"
    return said + (_of_library(stack, forked) if start_method == "fork" else "")


def _suspect(stack: Stack, waits: bool, inherited: Sequence[Inherited]) -> Inherited | None:
    """What was warned of at the start, and is named in a line that hangs, or is waited for."""
    lines = [frame.line or "" for frame in stack.frames if is_users(frame.filename)]
    forked = [each for each in inherited if each.by_fork]
    named = [each for each in forked if each.is_named_in(lines)]
    waited_for = [each for each in forked if waits and each.is_waited_for]
    return next(iter([*named, *waited_for]), None)


def _of_library(stack: Stack, forked: Forked) -> str:
    """Which library's threads are missing in the worker: those of the one at the top, if known."""
    library = _library_in(stack.frames)
    names = forked.threads.get(library)
    if names:
        return (
            f", in {library}. Its threads ({', '.join(names)}) ran in the training process when "
            "the worker was forked, and do not exist in the worker: what waits for them waits for "
            f"ever. {_sentence(without_threads(library))}"
        )
    lines = [frame.line or "" for frame in stack.frames if is_users(frame.filename)]
    native = next((each for each in forked.natives() if each.is_named_in(lines)), None)
    if native is not None:
        with_threads = f"; it had {_threads_text(forked.threads)}" if forked.threads else ""
        return (
            f"; first suspect: {native.path} ({native.kind}), which the training process made "
            f"before the worker was forked: {native.why}{with_threads}. {_sentence(native.advice)}"
        )
    if library:
        return (
            f", in {library}; if that ran in the training process before the workers were forked, "
            f"its threads and locks there did not survive: {without_threads(library)}"
        )
    if forked.threads:
        return (
            f". When it was forked, the training process had {_threads_text(forked.threads)}: none "
            "of them exists in the worker. If it waits for one, start them after the workers, or "
            "use multiprocessing_context='forkserver'"
        )
    return ""


def _threads_text(threads: Mapping[str, Sequence[str]]) -> str:
    told = [f"{library} ({', '.join(names)})" for library, names in threads.items()]
    return f"threads of {', '.join(told)}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"
