"""A loader in words, and as a notebook shows it. Runs in: main.

No code of the user's runs: no ``__len__`` and no ``__repr__`` of the dataset, nor a property of the
loader's class. What is told of the running epoch is that of the recorder.
"""

from __future__ import annotations

import os
from typing import Any

from safeloader.delivery.audit import EpochAudit, tone_of
from safeloader.introspect.html_text import table
from safeloader.introspect.texts import bounded_text
from safeloader.introspect.values import plain_length, short_type_name, type_name
from safeloader.provenance.metrics import metrics_of
from safeloader.provenance.recorder import Recorder
from safeloader.provenance.table import record_of
from safeloader.settings import Keywords, Unasked

_LOOKED_AT = 1000  # batches, the newest
_PLAIN = (bool, int, float, str, type(None), Unasked)  # compared without code of the user's
_MORE = "loader.audit, loader.provenance.slowest(), loader.metrics(), loader.summary()"


def in_words(loader: Any, ours: Any) -> str:
    """``SafeDataLoader(ImageFolder, batch_size=64, num_workers=4; on_error='skip')``.

    Args:
        loader: a loader of torch's.
        ours: what has our keywords as attributes: the loader, or what stands beside it.
    """
    held = vars(loader)
    parts = [_dataset(held), *_batches(held), *_workers(held)]
    on = _what_is_on(ours)
    return f"{type(loader).__name__}({', '.join(parts)}{'; ' * bool(on)}{', '.join(on)})"


def in_html(loader: Any, ours: Any, recorder: Recorder) -> str:
    """The same with how its newest epoch goes."""
    held = vars(loader)
    rows = [
        ("dataset", _dataset(held)),
        ("batches", ", ".join(_batches(held))),
        ("workers", ", ".join(_workers(held))),
        ("on", ", ".join(_what_is_on(ours)) or "the defaults"),
    ]
    audit = recorder.audit()
    if audit is None:
        return table(type(loader).__name__, rows)
    return table(type(loader).__name__, rows + _of_epoch(audit, recorder), tone_of(audit))


def _of_epoch(audit: EpochAudit, recorder: Recorder) -> list[tuple[str, str]]:
    known = metrics_of(recorder, _LOOKED_AT)
    rows = [("audit", str(audit).split("\n")[0])]
    if "wait_share" in known:
        of = f" (newest {_LOOKED_AT} batches)" if audit.batches > _LOOKED_AT else ""
        waited = f"{known['wait_share']:.0%} of the time; {known['samples_per_s']:,.0f} samples/s"
        rows.append(("waiting", waited + of))
    if "fetch_p50_ms" in known:
        half, most = known["fetch_p50_ms"], known["fetch_p95_ms"]
        rows.append(("a fetch", f"{half:.3f} ms (median), {most:.3f} ms (95th percentile)"))
    if left_out := [f"{n} {what}" for what, n in recorder.incidents.items() if n]:
        rows.append(("left out", ", ".join(left_out)))
    if "worker_memory_mib" in known:
        rows.append(("memory", f"{known['worker_memory_mib']:,.0f} MiB, all workers"))
    last = recorder.last_delivery()
    if last is not None:
        rows.append(("last batch", repr(record_of(last))))
    return [*rows, ("more", _MORE)]


def _dataset(held: dict[str, Any]) -> str:
    if "dataset" not in held:
        return "no dataset"
    length = plain_length(held["dataset"])
    name = short_type_name(type_name(type(held["dataset"])))
    return name if length is None else f"{name} ({length})"


def _batches(held: dict[str, Any]) -> list[str]:
    size = held.get("batch_size")
    sampler = held.get("batch_sampler")
    if size is None and sampler is not None:
        return [f"batch_sampler={_kind(sampler)}"]
    told = [f"batch_size={bounded_text(size)}"]
    kind = _kind(held.get("sampler"))
    if kind == "RandomSampler":
        told.append("shuffled")
    elif kind not in ("SequentialSampler", "_InfiniteConstantSampler", "NoneType"):
        told.append(f"sampler={kind}")
    return [*told, *["drop_last"] * (held.get("drop_last") is True)]


def _workers(held: dict[str, Any]) -> list[str]:
    told = [f"num_workers={bounded_text(held.get('num_workers'))}"]
    return told + [each for each in ("persistent_workers", "pin_memory") if held.get(each) is True]


def _kind(value: Any) -> str:
    return short_type_name(type_name(type(value)))


def _what_is_on(ours: Any) -> list[str]:
    """Each keyword that is not as by default, and what the environment asks for."""
    if os.environ.get("SAFELOADER", "").strip().lower() == "off":
        return ["SAFELOADER=off: nothing is recorded"]
    held, told = vars(ours), []
    for name in Keywords.__annotations__:
        default = getattr(Keywords, name)
        value = held.get(name, default)
        as_usual = value is default or (type(value) in _PLAIN and value == default)
        if not as_usual and name != "recorder":
            told.append(f"{name}={bounded_text(value)}")
    asked = os.environ.get("SAFELOADER_TRACE", "")
    if held.get("trace") is None and asked.lower() not in ("", "0", "false", "no", "off"):
        told.append(f"SAFELOADER_TRACE={bounded_text(asked)}")
    return told
