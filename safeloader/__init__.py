"""A drop-in DataLoader for PyTorch: which sample, where, when and by whom. Runs in: both.

::

    from safeloader import SafeDataLoader    # instead of torch.utils.data.DataLoader

A name is loaded when it is first used: the import itself does not wait for torch.
"""

import importlib
import importlib.util
import typing

from safeloader._version import __version__

if typing.TYPE_CHECKING:
    from safeloader.delivery.across_ranks import RunAudit, merge_audits
    from safeloader.delivery.audit import EpochAudit
    from safeloader.delivery.audit_part import AuditPart
    from safeloader.delivery.rank_groups import audit_across_ranks
    from safeloader.errors import (
        CollateError,
        DeliveryError,
        ResumeError,
        SafeLoaderError,
        SampleError,
        SamplerError,
        TransportError,
        ValidationError,
        WorkerCrashError,
        WorkerInitError,
        WorkerTimeoutError,
    )
    from safeloader.examining.doctor import doctor
    from safeloader.failures.failure import Failure
    from safeloader.failures.replay import replay
    from safeloader.global_batches import GlobalBatchSampler
    from safeloader.instrumenting import instrument, loaders_of
    from safeloader.introspect.seeds import sample_rng
    from safeloader.loader import SafeDataLoader
    from safeloader.provenance.recorder import Recorder
    from safeloader.provenance.table import BatchRecord, Provenance
    from safeloader.stateful import SafeStatefulDataLoader
    from safeloader.worker.policy import SKIP

__all__ = [
    "SKIP",
    "AuditPart",
    "BatchRecord",
    "CollateError",
    "DeliveryError",
    "EpochAudit",
    "Failure",
    "GlobalBatchSampler",
    "Provenance",
    "Recorder",
    "ResumeError",
    "RunAudit",
    "SafeDataLoader",
    "SafeLoaderError",
    "SafeStatefulDataLoader",
    "SampleError",
    "SamplerError",
    "TransportError",
    "ValidationError",
    "WorkerCrashError",
    "WorkerInitError",
    "WorkerTimeoutError",
    "__version__",
    "audit_across_ranks",
    "doctor",
    "instrument",
    "loaders_of",
    "merge_audits",
    "replay",
    "sample_rng",
]

_HOMES = {
    "SKIP": "worker.policy",
    "AuditPart": "delivery.audit_part",
    "BatchRecord": "provenance.table",
    "EpochAudit": "delivery.audit",
    "Failure": "failures.failure",
    "GlobalBatchSampler": "global_batches",
    "Provenance": "provenance.table",
    "Recorder": "provenance.recorder",
    "RunAudit": "delivery.across_ranks",
    "SafeDataLoader": "loader",
    "SafeStatefulDataLoader": "stateful",
    "audit_across_ranks": "delivery.rank_groups",
    "doctor": "examining.doctor",
    "instrument": "instrumenting",
    "loaders_of": "instrumenting",
    "merge_audits": "delivery.across_ranks",
    "replay": "failures.replay",
    "sample_rng": "introspect.seeds",
}


def __getattr__(name: str) -> typing.Any:
    if name in __all__:
        home = importlib.import_module(f"safeloader.{_HOMES.get(name, 'errors')}")
        return globals().setdefault(name, getattr(home, name))
    if not name.startswith("__") and importlib.util.find_spec(f"safeloader.{name}"):
        return importlib.import_module(f"safeloader.{name}")
    raise AttributeError(f"module 'safeloader' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
