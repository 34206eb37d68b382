"""What is examined: the parts of a loader, wherever the child gets them from. Runs in: main."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator
from multiprocessing import get_all_start_methods, get_context
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from safeloader import _torch
from safeloader._python import ForkingPickler, extra_reducers
from safeloader.global_batches import GlobalBatchSampler
from safeloader.introspect.pickling import UnpicklablePart, all_unpicklable
from safeloader.introspect.seeds import called_in, iterated_in
from safeloader.introspect.texts import index_text
from safeloader.introspect.values import plain_length, type_name
from safeloader.loader import KEYWORDS, SafeDataLoader

_KEPT = (
    *("key", "validate", "on_error", "retries", "max_skipped", "transport", "checksum"),
    *("seed", "seed_per"),
)
_DRAWN = 2000  # indices that are drawn to choose from
_REMEMBERED = 1000  # batches of a sampler that can be iterated once only
TO_WORKERS = ("dataset", "collate_fn", "worker_init_fn")  # what spawn has to send
_DRAWING = ("sampler", "batch_sampler", "generator")


class Subject:
    """The parts of a loader that the looks need; the loader itself is left alone.

    Attributes:
        dataset, sampler, batch_sampler, collate_fn, worker_init_fn, generator: the loader's own.
        batch_size, drop_last, num_workers, persistent_workers: as the loader has them.
        prefetch_factor: None without workers.
        method: how its workers are started.
        seed: the loader's, if it has one.
        kind: the name of its class; ``name`` says its dataset too.
        batched: whether samples are put into batches.
        is_stream: whether the dataset is an iterable one.
        excluded: texts of indices that hung, killed a child or raised: not fetched again.
        end: where the samples end, if the dataset's length is not true.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        each: Any = loader
        self.dataset: Any = each.dataset
        self.sampler: Any = each.sampler
        self.batch_sampler: Any = each.batch_sampler
        self.collate_fn: Any = each.collate_fn
        self.worker_init_fn: Any = each.worker_init_fn
        self.generator: Any = each.generator
        self.batch_size: int | None = each.batch_size
        self.drop_last: bool = each.drop_last
        self.num_workers: int = each.num_workers
        self.persistent_workers: bool = each.persistent_workers
        self.prefetch_factor: int | None = each.prefetch_factor
        # Not by get_start_method() alone: that fixes the default for the whole program.
        context: Any = each.multiprocessing_context or torch.multiprocessing
        default = get_all_start_methods()[0]
        self.method: str = context.get_start_method(allow_none=True) or default
        self.kind = type(loader).__name__
        self.saves_state = callable(getattr(type(loader), "state_dict", None))
        self.batched = _torch.batches_itself(loader)
        self.is_stream = isinstance(self.dataset, IterableDataset)
        self.excluded: set[str] = set()
        self.end: int | None = None
        self._ours: dict[str, Any] | None = None
        if isinstance(loader, SafeDataLoader):
            self._ours = {name: getattr(loader, name) for name in _KEPT if name in KEYWORDS}
        self.seed: int | None = None if self._ours is None else self._ours["seed"]

    @property
    def name(self) -> str:
        """The loader in a few words: ``DataLoader over Images (1000)``."""
        length = plain_length(self.dataset)
        told = type_name(type(self.dataset)).rsplit(".", 1)[-1]
        return f"{self.kind} over {told}" + (f" ({length})" if length is not None else "")

    def loader(self, draws: Any, workers: int, prefetch: int | None, method: str | None) -> Any:
        """A loader as the user's, but for what it draws and the workers it has."""
        options: dict[str, Any] = {"num_workers": workers}
        if workers:
            options |= {"persistent_workers": True, "prefetch_factor": prefetch}
            options["multiprocessing_context"] = get_context(method)
        options |= {"worker_init_fn": self.worker_init_fn, "collate_fn": self.collate_fn}
        if self.is_stream:
            options |= {"batch_size": self.batch_size, "drop_last": self.drop_last and self.batched}
        elif self.batched:
            options["batch_sampler"] = draws
        else:
            options |= {"sampler": draws, "batch_size": None}
        if self._ours is None:
            return DataLoader(self.dataset, **options)
        return SafeDataLoader(self.dataset, run_dir=False, **options, **self._ours)

    # ── what to fetch

    def sample(self, index: Any) -> Any:
        """``dataset[index]``, as it is called under the loader's ``seed=``: with a sample_rng()."""
        if self.seed is None:
            return self.dataset[index]
        return called_in(self.seed, self.dataset, index)

    def stream(self) -> Iterator[Any]:
        """``iter(dataset)``, in the same way."""
        return iter(self.dataset) if self.seed is None else iterated_in(self.seed, self.dataset)

    def length(self) -> int | None:
        """``len(dataset)``; None if it has none."""
        try:
            return len(self.dataset)
        except (TypeError, NotImplementedError):
            return None

    def draws_all(self) -> bool:
        """Whether indices are the places from 0 to the length, as far as torch's samplers go."""
        drawn = self.batch_sampler if self.batched else self.sampler
        within = getattr(drawn, "sampler", drawn)
        return type(within) in (SequentialSampler, RandomSampler)

    def batches(self) -> Iterator[Any]:
        """What the loader draws, epoch after epoch, without end; nothing where nothing comes.

        Batches with an index that does not come are left out; where each has one, only the index.
        """
        drawn = self.batch_sampler if self.batched else self.sampler
        kept: list[Any] = []
        parts: list[Any] = []
        given = 1
        while given:
            given = 0
            for batch in iter(drawn):
                good = self._is_good(batch)
                held = kept if good else parts
                if len(held) < _REMEMBERED:
                    held.append(batch)
                if good:
                    given += 1
                    yield batch
        # It can be iterated once, or each of its batches has an index that does not come.
        left: list[Any] = [None]
        while left:
            left = [batch for batch in kept if self._is_good(batch)]
            if not left and self.batched:
                left = [[each for each in batch if not self.is_bad(each)] for batch in parts + kept]
                left = [batch for batch in left if batch]
            yield from left

    def indices(self, most: int) -> list[Any]:
        """Some of the indices that the loader draws, the first and the last among them."""
        drawn = self.batch_sampler if self.batched else self.sampler
        found: list[Any] = []
        for batch in itertools.islice(iter(drawn), _DRAWN):
            found += list(batch) if self.batched else [batch]
            if len(found) >= _DRAWN:
                break
        if type(drawn) is GlobalBatchSampler:
            found += drawn.dropped()
        elif not found and self.batched:  # drop_last leaves no batch
            found += itertools.islice(iter(getattr(drawn, "sampler", ())), _DRAWN)
        length = self.length()
        if length and self.draws_all():
            found += [0, length - 1]
        if all(type(index) is int for index in found):
            found = sorted(set(found))
        found = [index for index in found if not self.is_bad(index)]
        if len(found) <= most:
            return found
        return [found[round(k * (len(found) - 1) / max(1, most - 1))] for k in range(most)]

    def _is_good(self, batch: Any) -> bool:
        if not self.excluded and self.end is None:
            return True
        return not any(map(self.is_bad, batch if self.batched else [batch]))

    def is_bad(self, index: Any) -> bool:
        """Whether it is known that this index does not come."""
        late = self.end is not None and type(index) is int and index >= self.end
        return late or index_text(index) in self.excluded

    # ── to be sent to a child that is not forked

    def unpicklable(self) -> list[UnpicklablePart]:
        """The parts that workers need and spawn cannot send."""
        return [each for name in TO_WORKERS for each in all_unpicklable(getattr(self, name), name)]

    def pickled(self) -> bytes:
        """All of it. What only draws and cannot be pickled is left out, and made anew.

        Raises:
            Exception: whatever the parts raise, if they cannot be pickled.
        """
        state = dict(vars(self))
        for name in _DRAWING:
            try:
                pickled_alone(state[name])
            except Exception:
                state[name] = None
        if state["batch_sampler" if self.batched else "sampler"] is None and not self.is_stream:
            state["sampler"] = state["batch_sampler"] = None
        return pickled_alone(state)

    @classmethod
    def unpickled(cls, content: bytes) -> Subject:
        """What :meth:`pickled` made."""
        subject = cls.__new__(cls)
        vars(subject).update(pickle.loads(content))
        if subject.is_stream or (subject.batch_sampler if subject.batched else subject.sampler):
            return subject
        plain: Any = DataLoader(
            subject.dataset, batch_size=subject.batch_size or (1 if subject.batched else None)
        )
        subject.sampler, subject.batch_sampler = plain.sampler, plain.batch_sampler
        return subject


class _Copying(ForkingPickler):
    """Pickles as multiprocessing does, but copies tensors: to share them would move the user's."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        for cls in extra_reducers or {}:
            if cls.__module__.partition(".")[0] == "torch" and cls is not torch.cuda.Event:
                self.dispatch_table.pop(cls, None)


def pickled_alone(value: Any) -> bytes:
    """A value as bytes, without anything of it moved to shared memory."""
    file = io.BytesIO()
    _Copying(file).dump(value)
    return file.getvalue()
