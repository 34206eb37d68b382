"""How the loading goes, in numbers for a logger: a reading of the recorder. Runs in: main."""

from __future__ import annotations

import numpy as np

from safeloader.provenance.columns import fetches_of
from safeloader.provenance.recorder import Recorder

_MIB = 1 << 20


def metrics_of(recorder: Recorder, last: int | None = None) -> dict[str, float]:
    """The numbers that :meth:`~safeloader.records.Records.metrics` tells.

    Raises:
        ValueError: if ``last`` is not a positive number.
    """
    if last is not None and last < 1:
        raise ValueError(f"last must be a positive number of batches, or None for all; got {last}")
    if not recorder.epochs:
        return {}
    batches = recorder.newest(None if last is None else last + 1)
    before = batches.pop(0) if last is not None and len(batches) > last else None
    fetches = fetches_of(batches)
    samples = fetches.size
    found: dict[str, float] = {
        "epoch": recorder.epochs - 1,
        "batches": len(batches),
        "samples": samples,
        "skipped": recorder.incidents["skipped"],
        "replaced": recorder.incidents["replaced"],
    }
    if batches:
        # From hand-over to hand-over where that is known: as many steps as waits are in it.
        began_ns = batches[0].began_ns if before is None else before.began_ns + before.wait_ns
        span_ns = max(1, batches[-1].began_ns + batches[-1].wait_ns - began_ns)
        found["wait_share"] = min(1.0, sum(each.wait_ns for each in batches) / span_ns)
        found["samples_per_s"] = samples / span_ns * 1e9
    if samples:
        half, most = np.percentile(fetches, [50, 95])
        found |= {"fetch_p50_ms": half / 1e6, "fetch_p95_ms": most / 1e6}
    memory = recorder.worker_memory()
    if memory is not None:
        found["worker_memory_mib"] = memory / _MIB
    return {name: float(value) for name, value in found.items()}
