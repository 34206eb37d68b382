"""The states of the datasets of all workers, as main knows and saves them. Runs in: main.

A state belongs to the batches that were handed over: of what a worker had made beyond them main
knows a later state, which it does not save. Saved, they lie where torchdata has them.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from safeloader.delivery.key_chain import BEGIN, chained
from safeloader.delivery.manifest import BatchManifest
from safeloader.errors import ResumeError
from safeloader.introspect.values import exception_text
from safeloader.transport.messages import StateMessage
from safeloader.worker.dataset_states import DatasetStates, Snapshot, Start, StatesPlan

Counts = tuple[int, int]  # of a worker: batches, and samples read for them


class Places(NamedTuple):
    """The places of all workers at one moment.

    Attributes:
        counts: what was handed over of each.
        snapshots: the newest state of each, pickled.
        last: the worker whose batch was handed over last; None before the first.
        keys: with ``key=``, of each the digest of the keys of what was handed over.
    """

    counts: tuple[Counts, ...]
    snapshots: dict[int, bytes]
    last: int | None = None
    keys: dict[int, bytes | None] = {}  # noqa: RUF012  # never changed


class DatasetPlaces:
    """Keeps the states of one epoch's workers.

    Args:
        workers: how many; 0: the main process reads.
        every: after how many batches of a worker its state is taken.
        saved: what :meth:`save` gave, to go on from.
        over: whether that epoch was over, so that the next one begins.
    """

    def __init__(
        self, workers: int, every: int, saved: dict[str, Any] | None = None, *, over: bool = False
    ) -> None:
        self._workers = workers
        starts = _starts(saved, over=over) if saved else {}
        self.plan = StatesPlan(every, starts)
        begun = {} if over else starts
        counts = [(0, 0) if w not in begun else begun[w][1:3] for w in range(max(workers, 1))]
        snapshots = {w: pickle.dumps(start.snapshot) for w, start in begun.items()}
        last = saved["_snapshot"].get("last") if begun and saved and workers else None
        keys = {w: start.keys for w, start in begun.items()}
        self.now = Places(tuple(counts), snapshots, last, keys)

    @property
    def newest(self) -> StatesPlan:
        """How new workers are to begin in the place of these, where batches were handed over."""
        starts = {
            worker: Start(pickle.loads(raw), *self.now.counts[worker])
            for worker, raw in self.now.snapshots.items()
        }
        return self.plan._replace(starts=starts)

    @property
    def requests(self) -> int:
        """How many state requests the workers get before their first task.

        All are asked; and then those before the one whose turn it is, so that it is asked next.
        Without workers nobody is: main asks itself.
        """
        last = self.now.last
        if not self._workers:
            return 0
        return self._workers + (0 if last is None else (last + 1) % self._workers)

    def told(self, message: StateMessage) -> None:
        """A worker told its state beside its batches: at its beginning, or at its end."""
        if message.worker_id in self.now.snapshots and not message.at_end:
            return  # the one that it was given to go on from
        snapshots = self.now.snapshots | {message.worker_id: message.state}
        self.now = self.now._replace(snapshots=snapshots)

    def passed(self, manifest: BatchManifest) -> None:
        """A batch is handed over, or its error raised."""
        worker = manifest.worker_id or 0
        counts, snapshots, _, keys = self.now
        batches, samples = counts[worker]
        if manifest.ordinal is not None:  # what an interrupt lost before it was read all the same
            samples = manifest.ordinal
        mine = (batches + 1, samples + (manifest.samples or 0))
        if manifest.snapshot is not None:
            snapshots = snapshots | {worker: manifest.snapshot}
        if manifest.keys is not None or keys:
            keys = keys | {worker: _with_keys(keys.get(worker, BEGIN), manifest)}
        counts = (*counts[:worker], mine, *counts[worker + 1 :])
        self.now = Places(counts, snapshots, worker, keys)

    def save(self, places: Places, here: DatasetStates | None) -> dict[str, Any]:
        """The keys of a state that hold this; ``here``: the main process reads."""
        if here is not None:
            # A copy, as from a worker: what it is made of goes on to change.
            snapshot = copy.deepcopy(here.now())._replace(batches=places.counts[0][0])
            batches, samples = places.counts[0]
            if snapshot.is_kept and not snapshot.ended:  # that is where it goes on
                samples = max(samples, snapshot.samples)
            return {**_plain(snapshot), "read": [batches, samples], **_keys(places, 0)}
        snapshots = {}
        for worker in range(self._workers):
            raw = places.snapshots.get(worker)
            snapshot = Snapshot() if raw is None else pickle.loads(raw)
            plain = {"worker_id": worker, **_plain(snapshot)}
            at = {"at": [snapshot.batches, snapshot.samples], **_keys(places, worker)}
            snapshots[f"worker_{worker}"] = plain | at
        whole = {"_worker_snapshots": snapshots, "_num_workers": self._workers}
        if places.last is not None:
            whole["last"] = places.last
        return {"_snapshot": whole | {"read": [list(each) for each in places.counts]}}


@contextmanager
def putting_back(states: DatasetStates) -> Iterator[None]:
    """Around the user's code that is given a state, in the main process.

    Raises:
        ResumeError: if it raises over the state.
    """
    try:
        yield
    except Exception as exc:
        found, _, next_step = states.refusal.partition("\n")
        if not found:
            raise
        what = f"{type(exc).__qualname__}: {exception_text(exc)}"
        raise ResumeError(f"{found} ({what})\n  next: {next_step}") from exc


def _with_keys(digest: bytes | None, manifest: BatchManifest) -> bytes | None:
    """The digest with the keys of a batch; None where a sample of it has none: it was left out."""
    if manifest.keys is None or len(manifest.keys) != manifest.samples or manifest.incidents:
        return None
    return chained(digest, manifest.keys)


def _keys(places: Places, worker: int) -> dict[str, str]:
    digest = places.keys.get(worker)
    return {} if digest is None else {"keys": digest.hex()}


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    fetcher = {"dataset_iter_state": snapshot.iterator, "fetcher_ended": snapshot.ended}
    return {"dataset_state": snapshot.dataset, "fetcher_state": fetcher}


def _starts(saved: dict[str, Any], *, over: bool) -> dict[int, Start]:
    """Where each worker is to begin."""
    if "_snapshot" not in saved:
        batches, samples = saved["read"]
        snapshot = _snapshot(saved, (batches, samples))
        return {0: Start(snapshot, batches, samples, over, _digest(saved))}
    whole = saved["_snapshot"]
    starts = {}
    for worker, (batches, samples) in enumerate(whole["read"]):
        told = whole["_worker_snapshots"][f"worker_{worker}"]
        at = _snapshot(told, told["at"])
        starts[worker] = Start(at, batches, samples, over, _digest(told))
    return starts


def _digest(told: dict[str, Any]) -> bytes | None:
    return bytes.fromhex(told["keys"]) if "keys" in told else None


def _snapshot(told: dict[str, Any], at: Any) -> Snapshot:
    fetcher = told["fetcher_state"]
    ended = fetcher["fetcher_ended"]
    snapshot = Snapshot(told["dataset_state"], fetcher["dataset_iter_state"], ended)
    # Without a state it is read again from its beginning.
    return snapshot._replace(batches=at[0], samples=at[1]) if snapshot.is_kept else snapshot


def workers_of(saved: dict[str, Any]) -> int:
    """By how many workers the dataset was read; 0: by the main process."""
    return int(saved["_snapshot"]["_num_workers"]) if "_snapshot" in saved else 0
