"""What type checkers have to let pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from safeloader import (
    SKIP,
    EpochAudit,
    Failure,
    GlobalBatchSampler,
    Recorder,
    SafeDataLoader,
    SafeLoaderError,
)


class Samples(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def leaves_out(failure: Failure) -> object:
    return SKIP if failure.index else 0


def indices_of(loader: SafeDataLoader[int]) -> tuple[int, ...]:
    return () if loader.last_batch is None else loader.last_batch.indices


loader = SafeDataLoader(Samples(), 4, True, num_workers=2, verify="warn", on_error="skip")
stock: DataLoader[int] = loader
generic: SafeDataLoader[int] = SafeDataLoader(Stream(), batch_size=None, on_error=leaves_out)
for batch in loader:
    print(batch.sum(), loader.last_batch.indices, loader.last_batch.worker_id)
print(loader.audit.ok)
other = SafeDataLoader(
    Samples(),
    recorder=Recorder(),
    max_skipped=0.1,
    on_crash="restart",
    transport="torch",
    generator=torch.Generator(),
    collate_fn=lambda samples: samples,
    worker_init_fn=lambda worker: None,
    persistent_workers=True,
)
try:
    other.replay(3)
except SafeLoaderError as error:
    print(error.failure.phase if error.failure else error.index)
audit: EpochAudit = loader.audit
shares = GlobalBatchSampler(3, 2, rank=0, world=1, tail="pad")
shared = SafeDataLoader(Samples(), batch_sampler=shares)
both: DataLoader[int] = DataLoader(Samples(), batch_sampler=shares)
indices: list[int] = next(shares.batches(epoch=1, start=1)) + shares.global_indices(0)
seeded = SafeDataLoader(Samples(), shuffle=True, seed=3, seed_per="batch")
seeded.set_epoch(2)
slowest_ns: list[int] = [sample.median_ns for sample in loader.provenance.slowest(3)]
line: str = loader.summary()
