"""Refuses bad arguments of ``SafeDataLoader`` at construction, saying what would be right; main."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from safeloader import tracing
from safeloader.main import dump
from safeloader.main.recorder import Recorder


def is_off() -> bool:
    """Whether ``SAFELOADER=off`` asks for torch's own behaviour.

    Raises:
        ValueError: if the variable holds something else than off, on or nothing.
    """
    value = os.environ.get("SAFELOADER", "").strip().lower()
    if value not in ("", "on", "off"):
        raise ValueError(
            f"the environment variable SAFELOADER must be 'off' (torch's own behaviour, nothing "
            f"recorded), 'on' or unset; it is {value!r}"
        )
    return value == "off"


def refuse_bad(given: Mapping[str, Any], dataset: object) -> None:
    """Check our keywords, by name.

    Raises:
        TypeError: for a value of another kind than is taken.
        ValueError: for a value out of range, or a folder that cannot be written to.
    """
    is_off()
    for name, check in _CHECKS.items():
        check(given[name])
    if given["on_crash"] == "restart" and isinstance(dataset, IterableDataset):
        raise ValueError(
            "on_crash='restart' needs a map-style dataset: a stream cannot be asked again for the "
            "samples that a dead worker had read. Leave on_crash='raise' for an iterable dataset"
        )


def _verify(value: object) -> None:
    if value not in ("raise", "warn", "off"):
        raise ValueError(
            f"verify must be 'raise' (an error when the audit fails), 'warn' or 'off'; "
            f"got {value!r}"
        )


def _trace(value: object) -> None:
    wanted = tracing.wish(value)
    if isinstance(wanted, Path):
        tracing.check_folder(wanted)


def _recorder(value: object) -> None:
    if value is not None and not isinstance(value, Recorder):
        raise TypeError(
            f"recorder must be a safeloader.Recorder, or None to have one made; got {value!r}"
        )


def _key(value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(
            f"key must be a callable that takes a sample and gives a hashable identity, such as "
            f"lambda sample: sample['id']; got {value!r}"
        )


def _on_error(value: object) -> None:
    if not callable(value) and value not in ("raise", "skip", "replace"):
        raise ValueError(
            "on_error must be 'raise', 'skip' (leave the sample out of its batch), 'replace' (by "
            "another sample of the batch) or a callable that takes a safeloader.Failure and gives "
            f"a sample or safeloader.SKIP; got {value!r}"
        )


def _retries(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            "retries must be an int, 0 or more: how often a failing sample is asked for again; "
            f"got {value!r}"
        )


def _max_skipped(value: object) -> None:
    if value is None:
        return
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_share = isinstance(value, float) and 0 < value <= 1
    if not (is_count or is_share):
        raise ValueError(
            "max_skipped must be a count (an int, 0 or more), a fraction of the samples so far (a "
            f"float above 0, up to 1.0), or None for one in a hundred; got {value!r}"
        )


def _on_crash(value: object) -> None:
    if value not in ("raise", "restart"):
        raise ValueError(
            "on_crash must be 'raise' or 'restart' (a new pool of workers goes on with the "
            f"batches that are open); got {value!r}"
        )


def _stall_after(value: object) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    if not good:
        raise ValueError(
            "stall_after must be the seconds without a batch after which a diagnosis is logged, "
            f"0 for never; got {value!r}"
        )


def _transport(value: object) -> None:
    if value not in ("auto", "torch"):
        raise ValueError(
            "transport must be 'auto' (shared memory that is written again and again, where there "
            f"is such) or 'torch' (torch's own way); got {value!r}"
        )


def _checksum(value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(
            "checksum must be True (the leaves of each batch are fingerprinted in the worker and "
            f"compared when it is handed over) or False; got {value!r}"
        )


_CHECKS: dict[str, Callable[[object], None]] = {
    "verify": _verify,
    "trace": _trace,
    "recorder": _recorder,
    "key": _key,
    "on_error": _on_error,
    "retries": _retries,
    "max_skipped": _max_skipped,
    "on_crash": _on_crash,
    "stall_after": _stall_after,
    "on_failure_dump": dump.check_folder,
    "transport": _transport,
    "checksum": _checksum,
}
