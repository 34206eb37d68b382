"""Compares a batch with the fingerprints that its worker took. Runs in: main."""

from __future__ import annotations

from typing import Any

from safeloader.delivery.manifest import BatchContents, BatchManifest
from safeloader.failures.failure import Failure
from safeloader.introspect.fingerprint import difference

_HINT = (
    "something wrote to the batch after the worker made it\n"
    "a dataset or collate_fn that goes on writing to a tensor it gave away (a buffer used again) "
    "does that: give away a copy; so does a pin_memory() that changes what it pins. Torch itself "
    "drops the mark of a conjugate or negative view: give away x.resolve_conj(). Otherwise "
    "suspect the machine's memory, or the way across: transport= gives the choice of two"
)


def changed(manifest: BatchManifest, batch: Any) -> Failure | None:
    """The failure, if ``batch`` is not what its manifest says it was."""
    assert manifest.fingerprints is not None
    asked, known, places, _ = BatchContents.of(manifest)
    found = difference(manifest.fingerprints, batch, len(asked))
    if found is None:
        return None
    positions = [places[row] for row in found.rows or () if row < len(places)]
    position = positions[0] if positions else (0 if len(asked) == 1 else None)
    which = ", ".join(str(known[each]) for each in positions[:8])
    if len(positions) > 8:
        which += f" and {len(positions) - 8} more"
    what = (
        "the sample of dataset index" if len(positions) == 1 else "the samples of dataset indices"
    )
    where = f", in {what} {which}" if positions else ""
    return Failure(
        phase="transport",
        exception_type="TransportError",
        message=f"{found.path} is not what the worker sent{where}",
        index=None if position is None else known[position],
        position=position,
        indices=asked,
        worker_id=manifest.worker_id,
        pid=manifest.pid,
        hint=_HINT,
    )
