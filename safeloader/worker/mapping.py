"""Batches of a map-style dataset. Runs in: worker.

Hot path. What it adds per sample is a clock reading and a cell in shared memory; the rows "small"
and "TensorDataset" of ``benchmarks/`` guard it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import monotonic
from time import perf_counter_ns as clock
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from safeloader import _torch
from safeloader.delivery.indices import (
    Packed,
    count,
    identity,
    pack,
    pack_unbatched,
    restored,
    same,
    unpack,
)
from safeloader.delivery.manifest import BatchManifest
from safeloader.introspect.random_state import preserved
from safeloader.introspect.resource_exhaustion import never_skipped
from safeloader.introspect.texts import bounded_text, index_text
from safeloader.supervision.flight_recorder import (
    COLLATE,
    COUNTED,
    FETCH,
    FETCH_AT_ONCE,
    PHASE,
    SINCE,
)
from safeloader.transport.messages import Task
from safeloader.worker.collating import FaultySample
from safeloader.worker.context import FetchContext
from safeloader.worker.recording import KeyFault, Made, RecordingFetcher
from safeloader.worker.repair import Donors, Unrepairable

_EXCLUDED = "its worker died at it twice"
_ASKED_AGAIN_S = 10.0  # for finding the index that __getitems__ cannot fetch


class MapFetcher(RecordingFetcher):
    """Samples of a map-style dataset: collated into batches, or one a batch (``batch_size=None``).

    Without batching the sampler may draw a list of indices (a batch sampler given as ``sampler``),
    and the dataset answers with a whole batch: each index in it is then accounted for.
    """

    def __init__(self, stock: Any, context: FetchContext) -> None:
        super().__init__(stock, context)
        self._stacks = self._batched and may_stack(stock.collate_fn)

    def _fetch(self, task: Task) -> Made:
        indices = task.index
        dataset = self._dataset
        cells = self._cells
        batched = self._batched
        now = clock
        at_once = batched and hasattr(dataset, "__getitems__") and bool(dataset.__getitems__)
        # Noted before the user's code sees the lists: it may sort or empty them.
        packed = task.packed
        if packed is None:
            packed = pack(indices) if batched else pack_unbatched(indices)
        number = count(packed)
        asked = list(indices) if at_once else indices
        stamps = self._stamps_for(number if batched else 1)
        cells[PHASE] = FETCH_AT_ONCE if at_once or not (batched or number == 1) else FETCH
        cells[SINCE] = stamps[0] = now()
        if self._policy.retries or task.one_by_one:
            return self._fetch_repaired(task, packed, asked, at_once, [], None, stamps)
        samples: Any = []
        fetched: list[Any] = []
        keys = None
        got: int | None = number
        k = 0
        phase = "sample"
        try:
            if at_once:
                samples = dataset.__getitems__(indices)
                k = 1
                stamps[1] = now()
                got = self._count(samples)
            elif batched:
                for k, index in enumerate(indices, 1):
                    samples.append(dataset[index])
                    stamps[k] = now()
                got = k
            else:
                samples.append(dataset[indices])
                k = 1
                stamps[1] = now()
            if self._key is not None and (batched or number == 1):
                keys = self._keys(samples)
            phase = "collate"
            cells[PHASE] = COLLATE
            fetched = samples
            batch = stacked(samples) if self._stacks else None
            if batch is None:
                if type(samples) is list:  # the collate function may take it apart
                    fetched = list(samples)
                self._packer.collates()
                batch = self._collate_fn(samples if batched else samples[0])
            stamps[k + 1] = now()
        except Exception as exc:
            seen = samples if phase == "sample" else fetched
            if self._repairs(exc, seen) and (batched or not seen):
                return self._fetch_repaired(task, packed, asked, at_once, seen, exc, stamps)
            faulty = FaultySample()
            if not batched:
                faulty, seen = FaultySample(0 if number == 1 else None), None
            elif phase == "sample" and not isinstance(exc, KeyFault):
                faulty = _find(dataset, asked, exc) if at_once else FaultySample(len(seen))
            manifest = self._manifest(
                seq=task.seq, indices=packed, samples=None, fetched_at_once=at_once or not batched
            )
            return self._failed(exc, manifest, phase, faulty, seen)
        whole = at_once or not batched
        worker_id, pid, times = self._worker_id, self._pid, stamps[: k + 2].tobytes()
        manifest = BatchManifest(task.seq, worker_id, pid, packed, got, None, times, whole, keys)
        return self._handed_over(manifest, batch, fetched if batched or number == 1 else ())

    def _count(self, samples: Any) -> int | None:
        """How many samples ``__getitems__`` gave; None where that cannot be told.

        Its contract is a list with one entry an index. A tuple, tensor or mapping in front of a
        collate function of the user's may well be a finished batch, whose length means nothing.
        """
        if type(samples) is list or self._collate_fn is default_collate:
            try:
                return len(samples)
            except TypeError:
                return None
        return None

    def _fetch_repaired(
        self,
        task: Task,
        packed: Packed,
        asked: Any,
        at_once: bool,
        samples: Any,
        failed: Exception | None,
        stamps: Any,
    ) -> Made:
        """The batch in spite of samples that fail: the dataset is asked for each of ``asked``.

        ``samples`` are those that came before ``failed`` was raised, by a sample or by collation.
        """
        known = unpack(packed)
        asked = list(asked) if self._batched else [asked]
        spread = 1 if self._batched else len(known)  # indices that one sample stands for
        get = functools.partial(self._one, at_once=at_once)
        repair = self._repair(known, self._donors(task, known, get), spread)
        whole = isinstance(samples, list) and len(samples) == len(asked)
        came = samples if whole or not at_once else []  # else each fails for itself, or comes

        def ask() -> None:
            if failed is None or at_once:  # else the stamps of those that came are there already
                stamps[0] = clock()
                for k in range(len(came)):
                    stamps[k + 1] = stamps[0]
            repair.have(came)
            first = None if at_once else failed
            for k in range(len(came), len(asked)):
                self._cells[PHASE] = FETCH if spread == 1 else FETCH_AT_ONCE
                if {*range(k, k + spread)} & {*task.excluded}:
                    repair.leave_out(_EXCLUDED)
                else:
                    repair.fetch(functools.partial(get, asked[k]), first)
                first = None
                stamps[k + 1] = clock()

        blank = self._manifest(
            seq=task.seq, indices=packed, samples=None, fetched_at_once=spread != 1
        )
        return self._repaired(repair, ask, blank, stamps)

    def _one(self, index: Any, at_once: bool) -> Any:
        if not at_once:
            return self._dataset[index]
        (sample,) = self._dataset.__getitems__([index])
        return sample

    def _donors(self, task: Task, known: tuple[Any, ...], get: Callable[[Any], Any]) -> Donors:
        """What was drawn earlier and comes, the nearest first; the generators stay where they are.

        Without batching an index may ask for many samples: as many are taken as are to be replaced.
        """
        batched = self._batched
        tried = [(each,) for each in known] if batched else [known]
        cells = self._cells
        for position, index in enumerate(map(restored, task.donors), len(known)):
            names = (identity(index),) if batched else unpack(pack_unbatched(index))
            if not batched and len(names) > len(known):
                index, names = index[: len(known)], names[: len(known)]
            if position in task.excluded or any(same(names, each) for each in tried):
                continue
            if not batched and len(names) < len(known):
                continue
            tried.append(names)
            cells[PHASE], cells[COUNTED], cells[SINCE] = FETCH, position, clock()
            try:
                with preserved():
                    sample = get(index)
            except Exception as exc:
                if never_skipped(exc):
                    text = f"at index {bounded_text(names[0])}, to stand in for them"
                    raise Unrepairable(None, exc, text) from None
                continue
            yield names, sample


def _find(dataset: Any, indices: list[Any], raised: Exception) -> FaultySample:
    """The first index of a batch that ``__getitems__`` cannot fetch alone, and how it was found.

    The samples are asked for one at a time, for ten seconds at most. That runs the user's code
    again, so the random-number generators are put back afterwards: the batches that follow are what
    they would have been.
    """
    if len(indices) == 1:
        return FaultySample(0)
    give_up = monotonic() + _ASKED_AGAIN_S
    one_at_a_time = f"the {len(indices)} samples one at a time"
    with preserved():
        for position, index in enumerate(indices):
            if monotonic() > give_up:
                return FaultySample(
                    text=f"__getitems__ raised; asking for {one_at_a_time}, the first {position} "
                    f"came without error in {_ASKED_AGAIN_S:.0f} s"
                )
            try:
                dataset.__getitems__([index])
            except type(raised):
                return FaultySample(
                    position,
                    f"__getitems__ raised for the whole batch; index {index_text(index)} was "
                    f"found by asking for {one_at_a_time}",
                )
            except KeyboardInterrupt:
                raise
            except BaseException:  # another fault of the same call: not the one to explain
                continue
    return FaultySample(
        text=f"__getitems__ raised for the whole batch, but for none of the {len(indices)} indices "
        "asked for one at a time: look at what they have in common"
    )


# ── tuples of tensors ────────────────────────────────────────────────────────────────────────────
# The commonest samples of a loader without workers, those of a ``TensorDataset`` for one. The walk
# of ``default_collate`` through their types takes 4 of 30 µs for a batch of 64, about what all
# records of the batch take. The first sample decides here too, and ``torch.stack`` is called alike.


def may_stack(collate_fn: Any) -> bool:
    """Whether batches are collated by ``default_collate``, in a process that is no worker."""
    return collate_fn is default_collate and get_worker_info() is None


def stacked(samples: Any) -> list[torch.Tensor] | None:
    """What ``default_collate`` makes of tuples of tensors; None of anything else. Hot path.

    None also where it would raise, so that its own error is the one that is told.
    """
    if type(samples) is not list or not samples or type(samples[0]) is not tuple:
        return None
    if not _torch.collates_tuples_of_tensors_itself():
        return None
    first = samples[0]
    for each in first:
        if type(each) is not torch.Tensor or each.layout is not torch.strided or each.is_nested:
            return None
    try:
        return [torch.stack(column, 0) for column in zip(*samples, strict=True)]
    except Exception:
        return None
