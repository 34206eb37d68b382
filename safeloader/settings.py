"""Our keywords, checked once and handed on instead of the loader. Runs in: main."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter, is_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import IterableDataset

from safeloader._python import environment
from safeloader.checks.unique import Unique
from safeloader.introspect.files import folder_of, see_writable
from safeloader.introspect.seeds import SeedPer
from safeloader.introspect.texts import bounded_text

if TYPE_CHECKING:
    from safeloader.failures.failure import Failure

Verify = Literal["raise", "warn", "off"]
OnError = Literal["raise", "skip", "replace"]
OnCrash = Literal["raise", "restart"]
Transport = Literal["auto", "torch"]
Check = Callable[[Any, Any], object]


RUN_BYTES_LEAST = 1 << 20
"""The smallest bound on a run's batches."""

SAID = "_said"
"""The attribute of a loader that holds how many batches it said it has, since its last epoch."""

KEEPS_PLACE = "_continuity"
"""The attribute of a loader that keeps its place, for what keeps it."""

KEPT = "_safeloader_kept"
"""The attribute of a loader without workers that holds what its next epoch may begin with."""


class Unasked(str):
    """A value that nobody asked for in so many words, though frameworks may hand it back."""

    __slots__ = ()


UNASKED: Any = Unasked("raise")  # the default of ``verify``


def is_off() -> bool:
    """Whether ``SAFELOADER=off`` asks for torch's own behaviour.

    Raises:
        ValueError: if the variable holds something else than off, on or nothing.
    """
    value = environment("SAFELOADER")
    if not value:
        return False
    value = value.strip().lower()
    if value not in ("", "on", "off"):
        raise ValueError(
            f"the environment variable SAFELOADER must be 'off' (torch's own behaviour, nothing "
            f"recorded), 'on' or unset; it is {value!r}"
        )
    return value == "off"


def freezes_garbage() -> bool:
    """Whether workers leave what they inherited out of garbage collection; as a rule they do.

    Raises:
        ValueError: if ``SAFELOADER_GC_FREEZE`` holds something else than 0, 1 or nothing.
    """
    return _is_on("SAFELOADER_GC_FREEZE", "workers leave what they inherit out of collections")


def keeps_heap() -> bool:
    """Whether workers keep the memory of large batches' samples for the next; as a rule they do.

    Raises:
        ValueError: if ``SAFELOADER_KEEP_HEAP`` holds something else than 0, 1 or nothing.
    """
    return _is_on("SAFELOADER_KEEP_HEAP", "the memory of a batch's samples serves the next ones")


def keeps_slots() -> bool:
    """Whether slots outlive an epoch's workers, to serve the next ones; as a rule they do.

    Raises:
        ValueError: if ``SAFELOADER_KEEP_SLOTS`` holds something else than 0, 1 or nothing.
    """
    return _is_on("SAFELOADER_KEEP_SLOTS", "the slots of an epoch's workers serve the next ones")


def pickles_once() -> bool:
    """Whether what workers are started with is pickled once for all of them; as a rule it is.

    Raises:
        ValueError: if ``SAFELOADER_PICKLE_ONCE`` holds something else than 0, 1 or nothing.
    """
    return _is_on("SAFELOADER_PICKLE_ONCE", "the dataset is pickled once for all workers")


def _is_on(variable: str, meaning: str) -> bool:
    value = environment(variable).strip()
    if value not in ("", "0", "1"):
        raise ValueError(
            f"the environment variable {variable} must be 1 ({meaning}), 0 or unset; it is "
            f"{value!r}"
        )
    return value != "0"


class Keywords:
    """Our keywords and their defaults; see :class:`~safeloader.SafeDataLoader`."""

    verify: Verify = UNASKED
    trace: bool | str | os.PathLike[str] | None = None
    recorder: Any = None  # a Recorder, which its own room makes and knows
    key: Callable[[Any], Hashable] | None = None
    validate: Check | Sequence[Check] | None = None
    on_error: OnError | Callable[[Failure], Any] = "raise"
    retries: int = 0
    max_skipped: int | float | None = None
    on_crash: OnCrash = "raise"
    stall_after: float = 60.0
    on_failure_dump: str | os.PathLike[str] | None = None
    transport: Transport = "auto"
    checksum: bool = False
    seed: int | None = None
    seed_per: SeedPer = "sample"
    run_dir: bool | str | os.PathLike[str] | None = None
    run_max_bytes: int | None = None
    run_sources: bool = False


@dataclass(frozen=True)
class Settings(Keywords):
    """Our keywords as they stand for one epoch."""

    __annotations__ = Keywords.__annotations__  # its fields

    @classmethod
    def of(cls, loader: Any) -> Settings:
        """What the attributes of a loader say now."""
        # Not by the constructor, which sets one after the other: a tenth of a tiny epoch.
        settings = cls.__new__(cls)
        vars(settings).update(zip(_NAMES, _values(loader), strict=True))
        return settings

    def same_as(self, other: Settings) -> bool:
        """Whether these are the same values, and nothing begins anew with an epoch as checks do."""
        return self.validate is None and all(map(is_, vars(self).values(), vars(other).values()))

    @property
    def trace_target(self) -> bool | Path:
        """Where the trace goes: nowhere (False), into the log (True), or into a folder."""
        if isinstance(self.trace, bool):
            return self.trace
        if self.trace is not None:
            return folder_of(self.trace)
        value = environment("SAFELOADER_TRACE")
        if value.lower() in ("", "0", "false", "no", "off"):
            return False
        return True if value.lower() in ("1", "true", "yes", "on") else folder_of(value)

    @property
    def run_target(self) -> Path | None:
        """The folder of the run; None where nothing is to be written."""
        if self.run_dir is not None:
            return None if self.run_dir is False else folder_of(self.run_dir)
        value = environment("SAFELOADER_RUN")
        return folder_of(value) if value else None

    @property
    def may_write(self) -> bool:
        """Whether there may be a trace or a folder of a run, which most programs have not."""
        told = environment("SAFELOADER_TRACE") or environment("SAFELOADER_RUN")
        asked = self.trace is not None or self.run_dir is not None
        return asked or told != ""

    @property
    def tells(self) -> bool:
        """Whether failures that end no batch are told too, and not only counted."""
        return self.on_failure_dump is not None or self.run_target is not None

    @property
    def checks(self) -> tuple[Check, ...]:
        """What each sample is to pass."""
        given = self.validate
        return () if given is None else (given,) if callable(given) else tuple(given)

    @property
    def identity(self) -> Callable[[Any], Hashable] | None:
        """What gives samples an identity: ``key``, or that of ``checks.unique``."""
        if self.key is None and self.validate is None:
            return None
        return next(iter(self._identities), None)

    @property
    def _identities(self) -> list[Callable[[Any], Hashable]]:
        keys = [self.key, *(each.key for each in self.checks if type(each) is Unique)]
        return [key for key in keys if key is not None]

    def refuse_bad(self, dataset: object) -> None:
        """Check every value, and that they go with the dataset.

        Raises:
            TypeError: for a value of another kind than is taken.
            ValueError: for a value out of range, or a folder that cannot be written to.
            ImportError: for ``run_dir`` without pyarrow.
        """
        if is_off():
            return
        for name, (is_good, wanted) in _RULES.items():
            value = getattr(self, name)
            if not is_good(value):
                error = TypeError if name in _KINDS else ValueError
                raise error(f"{name} must be {wanted}; got {bounded_text(value)}")
        for each in self.checks:
            _see_callable(each)
        if len(self._identities) > 1:
            raise ValueError(
                "samples have one identity: give key=, or one checks.unique in validate=, not both"
            )
        freezes_garbage()
        keeps_heap()
        keeps_slots()
        pickles_once()
        _see_writable("trace files", self.trace_target, _TRACE_ADVICE)
        _see_writable("failures", self.on_failure_dump, _DUMP_ADVICE)
        if self.run_dir is not None and self.run_target is not None:
            _see_writable("the run", self.run_target, _RUN_ADVICE)
            if importlib.util.find_spec("pyarrow") is None:
                raise ImportError(f"run_dir= needs pyarrow: {_INSTALL}")
        if self.on_crash == "restart" and isinstance(dataset, IterableDataset):
            raise ValueError(
                "on_crash='restart' needs a map-style dataset: a stream cannot be asked again for "
                "the samples that a dead worker had read. Leave on_crash='raise' for an iterable "
                "dataset"
            )


_NAMES = tuple(each.name for each in fields(Settings))
_values: Callable[[Any], tuple[Any, ...]] = attrgetter(*_NAMES)


def _see_callable(check: Check) -> None:
    """That a check takes a sample and an index, as far as its signature tells.

    Raises:
        TypeError: if it does not.
    """
    said = f"validate= was given {bounded_text(check)}"
    if isinstance(check, type):
        raise TypeError(f"{said}, a class: make a check of it, {check.__name__}()")
    try:
        signature = inspect.signature(check)
    except (TypeError, ValueError):  # written in another language
        return
    try:
        signature.bind(None, None)
    except TypeError as exc:
        raise TypeError(
            f"{said}, which cannot be called with (sample, index): {exc}. A check is "
            "def check(sample, index), and raises where the sample is not as it should be"
        ) from None


_TRACE_ADVICE = (
    "trace= (or SAFELOADER_TRACE) a folder that can be written to, 1 for log lines, or 0 for "
    "nothing"
)
_DUMP_ADVICE = "on_failure_dump= a folder that can be written to, or None"
_RUN_ADVICE = "run_dir= a folder that can be written to, or None"
_INSTALL = "pip install 'safeloader[run]'"
# Told when something is to be written, if it still holds.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


def _see_writable(what: str, target: object, advice: str) -> None:
    if target is None or isinstance(target, bool):
        return
    folder = folder_of(target)
    try:
        see_writable(folder)
    except OSError as exc:
        if exc.errno not in _PASSING:
            said = f"{what} cannot be written to {str(folder)!r}: {exc}. Give {advice}"
            raise ValueError(said) from exc


def _is_a(*numbers: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


_KINDS = (
    "trace",
    "key",
    "validate",
    "on_failure_dump",
    "run_dir",
)  # of which another kind is a TypeError
_is_path = _is_a(str, os.PathLike)

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "verify": (
        _one_of("raise", "warn", "off"),
        "'raise' (an error when the audit fails), 'warn' or 'off'",
    ),
    "trace": (
        lambda value: value is None or isinstance(value, bool) or _is_path(value),
        "None (ask SAFELOADER_TRACE), False, True (log lines) or a folder for trace files",
    ),
    "key": (
        lambda value: value is None or callable(value),
        "a callable that takes a sample and gives a hashable identity, such as "
        "lambda sample: sample['id']",
    ),
    "validate": (
        lambda value: (
            value is None
            or callable(value)
            or (isinstance(value, list | tuple) and all(map(callable, value)))
        ),
        "None, a check or a list of checks: callables that take (sample, index) and raise, such as "
        "checks.finite()",
    ),
    "on_error": (
        lambda value: callable(value) or _one_of("raise", "skip", "replace")(value),
        "'raise', 'skip' (leave the sample out of its batch), 'replace' (by another sample of the "
        "batch) or a callable that takes a safeloader.Failure and gives a sample or "
        "safeloader.SKIP",
    ),
    "retries": (
        lambda value: _is_a(int)(value) and value >= 0,
        "an int, 0 or more: how often a failing sample is asked for again",
    ),
    "max_skipped": (
        lambda value: value is None or (value >= 0 if _is_a(int)(value) else _is_share(value)),
        "a count (an int, 0 or more), a fraction of the samples so far (a float above 0, up to "
        "1.0), or None for one in a hundred",
    ),
    "on_crash": (
        _one_of("raise", "restart"),
        "'raise' or 'restart' (a new pool of workers goes on with the batches that are open)",
    ),
    "stall_after": (
        lambda value: _is_a(int, float)(value) and value >= 0,
        "the seconds without a batch after which a diagnosis is logged, 0 for never",
    ),
    "on_failure_dump": (
        lambda value: value is None or _is_path(value),
        "a folder to write failures into, or None",
    ),
    "transport": (
        _one_of("auto", "torch"),
        "'auto' (shared memory that is written again and again, on systems that have it) or "
        "'torch' (torch's own way)",
    ),
    "checksum": (
        lambda value: isinstance(value, bool),
        "True (the leaves of each batch are fingerprinted in the worker and compared when it is "
        "handed over) or False",
    ),
    "seed": (
        lambda value: value is None or (_is_a(int)(value) and value >= 0),
        "an int, 0 or more, that all random numbers are made from, or None for torch's own way",
    ),
    "seed_per": (
        _one_of("sample", "batch"),
        "'sample' (the generators are seeded for each sample, and for collation) or 'batch' (once "
        "for each batch)",
    ),
    "run_dir": (
        lambda value: value is None or value is False or _is_path(value),
        "a folder that the run is written into, None (ask SAFELOADER_RUN) or False (none)",
    ),
    "run_max_bytes": (
        lambda value: value is None or (_is_a(int)(value) and value >= RUN_BYTES_LEAST),
        f"the bytes that this process may keep of a run's batches, an int from {RUN_BYTES_LEAST} "
        "(1 MiB) on, or None for no bound",
    ),
    "run_sources": (
        lambda value: isinstance(value, bool),
        "True (the source of every sample is stored with the run, once) or False (of those that "
        "failed, were left out or are the slowest)",
    ),
}
