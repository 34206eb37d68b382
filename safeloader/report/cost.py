"""What loading costs: memory of main and workers, slots, shared memory. Runs in: main."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from safeloader.report.run import RunFolder

WAYS = {
    "slots": "by slots: shared memory that is written to in turn",
    "message": "within the worker's message, as they are small",
    "torch": "by torch's own shared memory, a file for each tensor",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the processes of a run used, at most; sizes in bytes, -1 where they are not known.

    Attributes:
        workers: how many there were, over all loaders and attempts.
        worker_uss: of one worker: its own.
        worker_pss: its share: pages that several map are divided among them.
        worker_rss: what it has mapped.
        shared: of that, what others have mapped too.
        main_rss: what a main process has mapped.
        loaders: how many loaders told of their transport.
        slots: of one loader: how many slots were mapped.
        slot_bytes: the size of these.
        batches: how many batches came from workers by each way.
        fallbacks: why some or all of a batch was not in a slot, the most frequent first.
        shm_used: of ``/dev/shm``, by all processes of the machine.
        shm_bytes: its size.
    """

    workers: int = 0
    worker_uss: int = -1
    worker_pss: int = -1
    worker_rss: int = -1
    shared: int = -1
    main_rss: int = -1
    loaders: int = 0
    slots: int = 0
    slot_bytes: int = 0
    batches: dict[str, int] = dataclasses.field(default_factory=dict)
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)
    shm_used: int = -1
    shm_bytes: int = -1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, that ``json.dumps`` takes."""
        return dataclasses.asdict(self)


def cost_of(run: RunFolder, attempt: int | None = None) -> Cost:
    """What a run used, or one attempt of it.

    Args:
        run: as it is now.
        attempt: of which alone.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from safeloader import SafeDataLoader
        >>> run_dir = tempfile.TemporaryDirectory()
        >>> data = torch.zeros(8, 5000)
        >>> loader = SafeDataLoader(data, batch_size=4, num_workers=1, run_dir=run_dir.name)
        >>> batches = list(loader)
        >>> cost_of(RunFolder(run_dir.name)).batches
        {'slots': 2}
        >>> run_dir.cleanup()
    """
    return Cost(**_memory(run.workers(attempt)), **_transport(run.transport(attempt)))


def _memory(workers: Any) -> dict[str, Any]:
    if not workers.num_rows:
        return {}
    rss, pss, uss = (workers[f"{name}_bytes"].to_numpy() for name in ("rss", "pss", "uss"))
    shared = np.where((rss >= 0) & (uss >= 0), rss - uss, -1)
    of_worker = workers["worker"].to_numpy() >= 0
    names = ("attempt", "loader", "worker")
    places = np.stack([workers[name].to_numpy()[of_worker].astype(np.int64) for name in names], 1)
    return {
        "workers": len(np.unique(places, axis=0)),
        "worker_uss": _most(uss[of_worker]),
        "worker_pss": _most(pss[of_worker]),
        "worker_rss": _most(rss[of_worker]),
        "shared": _most(shared[of_worker]),
        "main_rss": _most(rss[~of_worker]),
    }


def _most(sizes: Any) -> int:
    """The largest; -1 where none is known."""
    return int(sizes.max()) if sizes.size else -1


def _transport(lines: list[dict[str, Any]]) -> dict[str, Any]:
    if not lines:
        return {}
    newest = {each["loader"]: each for each in lines}  # in each loader the counts go on
    batches, fallbacks = Counter[str](), Counter[str]()
    for each in newest.values():
        batches.update(each.get("batches") or {})
        fallbacks.update(each.get("fallbacks") or {})
    return {
        "loaders": len(newest),
        "slots": max(int(each.get("slots", 0)) for each in lines),
        "slot_bytes": max(int(each.get("slot_bytes", 0)) for each in lines),
        "batches": dict(batches.most_common()),
        "fallbacks": dict(fallbacks.most_common()),
        "shm_used": max(int(each.get("shm_used", -1)) for each in lines),
        "shm_bytes": max(int(each.get("shm_bytes", -1)) for each in lines),
    }
