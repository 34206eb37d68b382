"""A drop-in DataLoader for PyTorch that says which sample, where, when and by whom.

::

    from safeloader import SafeDataLoader    # instead of torch.utils.data.DataLoader
"""

from safeloader._version import __version__
from safeloader.errors import (
    CollateError,
    DeliveryError,
    SafeLoaderError,
    SampleError,
    SamplerError,
    TransportError,
    WorkerCrashError,
    WorkerInitError,
    WorkerTimeoutError,
)
from safeloader.loader import SafeDataLoader
from safeloader.main.audit import EpochAudit
from safeloader.main.provenance import BatchRecord, Provenance
from safeloader.main.recorder import Recorder
from safeloader.main.replay import replay
from safeloader.wire.failure import Failure
from safeloader.wire.policy import SKIP

__all__ = [
    "SKIP",
    "BatchRecord",
    "CollateError",
    "DeliveryError",
    "EpochAudit",
    "Failure",
    "Provenance",
    "Recorder",
    "SafeDataLoader",
    "SafeLoaderError",
    "SampleError",
    "SamplerError",
    "TransportError",
    "WorkerCrashError",
    "WorkerInitError",
    "WorkerTimeoutError",
    "__version__",
    "replay",
]
