"""A zoo of bad objects, each failing in one named way; at module level, for any start method."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info


class NeedsArguments(Exception):
    """Its constructor wants arguments that its ``args`` do not hold."""

    def __init__(self, path: str, *, line: int) -> None:
        super().__init__(f"{path}:{line}")
        self.path = path
        self.line = line


class HoldsALock(ValueError):
    """Cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()
        self.code = 17


class CannotBeShown(RuntimeError):
    def __str__(self) -> str:
        raise ZeroDivisionError("no text today")

    __repr__ = __str__


class Slotted(Exception):
    __slots__ = ("detail",)

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class StrictMeta(type):
    def __new__(cls, name: str, bases: Any, namespace: Any) -> Any:
        if name not in ("Unmixable",):
            raise TypeError("this class is not to be derived from")
        return super().__new__(cls, name, bases, namespace)


class Unmixable(Exception, metaclass=StrictMeta):
    pass


def a_local_class() -> type[Exception]:
    class Local(LookupError):
        pass

    return Local


def raisers() -> dict[str, Any]:
    """Name -> a function that raises."""

    def throw(make: Any) -> Any:
        def run() -> None:
            raise make()

        return run

    def chained() -> None:
        try:
            {}["inner"]
        except KeyError as exc:
            raise ValueError("outer") from exc

    def undecodable() -> None:
        b"\xff".decode()

    def no_such_file() -> None:
        open("/no/such/file")  # noqa: SIM115

    return {
        "KeyError": throw(lambda: KeyError("feature")),
        "needs arguments": throw(lambda: NeedsArguments("data.csv", line=3)),
        "holds a lock": throw(lambda: HoldsALock("locked")),
        "cannot be shown": throw(CannotBeShown),
        "slotted": throw(lambda: Slotted("deep")),
        "unmixable": throw(Unmixable),
        "local class": throw(lambda: a_local_class()("here only")),
        "chained": chained,
        "undecodable": undecodable,
        "no such file": no_such_file,
        "StopIteration": throw(StopIteration),
        "StopAsyncIteration": throw(StopAsyncIteration),
        "huge message": throw(lambda: ValueError("x" * 1_000_000)),
        "no message": throw(ValueError),
        "group": throw(lambda: ExceptionGroup("several", [ValueError(1), KeyError(2)])),
    }


class Raises:
    """Raises in ``__getitem__`` at one index."""

    def __init__(self, how: str = "KeyError", at: int = 13, length: int = 40) -> None:
        self.how = how
        self.at = at
        self.length = length
        self.fetched = 0
        self.api_token = "hf_verysecret"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.fetched += 1
        if index == self.at:
            raisers()[self.how]()
        return torch.tensor(index)


class RaisesTogether(Raises):
    """The same in ``__getitems__``; drawing random numbers on the way."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        torch.rand(1)
        return [self[index] for index in indices]


class RaisesTogetherOnly(Raises):
    """No single index is at fault: the combination is."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        if self.at in indices and len(indices) > 1:
            raise ValueError("these do not go together")
        return [torch.tensor(index) for index in indices]


class Miscounts:
    """``__getitems__`` that gives more or fewer samples than asked for, from one batch on."""

    def __init__(self, by: int, length: int = 40) -> None:
        self.by = by
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        samples = [torch.tensor(index) for index in indices]
        if 13 in indices:
            return samples[: self.by] if self.by < 0 else samples + samples[: self.by]
        return samples


class RaisingStream(IterableDataset):  # type: ignore[type-arg]
    """Raises in ``__next__`` at one ordinal, and then goes on or not."""

    def __init__(self, at: int = 5, length: int = 20, goes_on: bool = False) -> None:
        self.at = at
        self.length = length
        self.goes_on = goes_on

    def __iter__(self) -> Iterator[int]:
        return _RaisingIterator(self) if self.goes_on else self._generate()

    def _generate(self) -> Iterator[int]:
        for number in range(self.length):
            if number == self.at:
                raise KeyError("feature")
            yield number


class _RaisingIterator:
    def __init__(self, stream: RaisingStream) -> None:
        self.stream = stream
        self.number = -1

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.number += 1
        if self.number == self.stream.at:
            raise KeyError("feature")
        if self.number >= self.stream.length:
            raise StopIteration
        return self.number


class UnstartableStream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        raise OSError(2, "No such file", "shards.tar")


class IdleWorkerStream(IterableDataset):  # type: ignore[type-arg]
    """All the data is worker 0's."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(6 if info is None or info.id == 0 else 0))


class Ragged:
    """One sample is unlike the others."""

    def __init__(self, how: str, at: int = 13, length: int = 40) -> None:
        self.how = how
        self.at = at
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        sample: dict[str, Any] = {"feature": torch.zeros(3), "label": index}
        if index != self.at:
            return sample
        if self.how == "None":
            return None
        if self.how == "key":
            del sample["feature"]
        if self.how == "shape":
            sample["feature"] = torch.zeros(4)
        return sample


class LosesAttribute:
    """Its ``__getstate__`` leaves something behind on the way to the worker."""

    def __init__(self) -> None:
        self.handle = "open"
        self.epoch = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> str:
        return self.handle


class RaisingSampler:
    def __init__(self, at: int = 6) -> None:
        self.at = at

    def __iter__(self) -> Iterator[int]:
        for number in range(20):
            if number == self.at:
                raise KeyError("no such stratum")
            yield number

    def __len__(self) -> int:
        return 20


class UnstartableSampler:
    def __iter__(self) -> Iterator[int]:
        raise KeyError("no strata at all")

    def __len__(self) -> int:
        return 20


def init_raises(worker_id: int) -> None:
    if worker_id == 1:
        raise FileNotFoundError(2, "No such file or directory", "lexicon.txt")


def collate_raises(samples: list[Any]) -> Any:
    if any(int(sample) == 13 for sample in samples):
        raise HoldsALock("cannot collate")
    return samples


def collate_stops(samples: list[Any]) -> Any:
    if any(int(sample) == 13 for sample in samples):
        raise StopIteration
    return samples


def key_raises(sample: Any) -> Any:
    if int(sample) == 13:
        raise KeyError("id")
    return int(sample)


def key_unhashable(sample: Any) -> Any:
    return [int(sample)]


def key_thirds(sample: Any) -> int:
    return int(sample) // 3


def key_value(sample: Any) -> int:
    return int(sample)


def key_constant(sample: Any) -> int:
    return 0


class PinningFails:
    def __init__(self, value: Any) -> None:
        self.value = value

    def pin_memory(self) -> Any:
        raise BufferError("cannot pin this")


def collate_unpinnable(samples: list[Any]) -> PinningFails:
    return PinningFails(samples)
