"""What a worker's copy of the dataset is like, told in the place of its batch. Runs in: worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from zlib import crc32

from torch.utils.data import get_worker_info

from safeloader.introspect.copy_state import copy_state
from safeloader.introspect.fingerprint import fingerprint
from safeloader.introspect.generator_kinds import process_generators, standing
from safeloader.introspect.generators import generators_of
from safeloader.introspect.seeds import EpochSeed, sample_is

GLOBAL = {"random": "Python's random", "numpy": "NumPy's", "torch": "torch's"}


class Told(NamedTuple):
    """What a worker told after a batch of one sample.

    Attributes:
        worker: its number.
        generators: prints of the states of the generators that are global, and held, by path.
        scalars: numbers and short texts that its dataset holds, by path.
        sample: a print of the sample; 0 if nothing of it can be compared.
    """

    worker: int
    generators: dict[str, int]
    scalars: dict[str, Any]
    sample: int


class Probe:
    """Stands for ``collate_fn``, so it runs in the worker right after a batch was fetched."""

    def __call__(self, samples: Any) -> Told:
        """Look at this worker's copy."""
        info: Any = get_worker_info()
        return Told(
            info.id, states_of(info.dataset), scalars_of(info.dataset), print_of(samples) or 0
        )


class Initialized:
    """Stands for ``worker_init_fn`` with ``seed=``: there is a :func:`safeloader.sample_rng`."""

    def __init__(self, by_user: Callable[[int], Any] | None, seed: int) -> None:
        self._by_user, self._seed = by_user, seed

    def __call__(self, worker: int) -> None:
        """The user's own, then ours; no two workers have the same."""
        if self._by_user is not None:
            self._by_user(worker)
        sample_is((EpochSeed(self._seed, 0).key, worker))


def print_of(sample: Any) -> int | None:
    """One number for all that can be compared of a sample; None if nothing can."""
    leaves = fingerprint(sample, None)
    return crc32(repr(leaves).encode("utf-8", "replace")) if leaves else None


def states_of(dataset: Any) -> dict[str, int]:
    """Prints of where the generators stand: the three global ones and those that it holds."""
    own = {name.partition(".")[0]: each for name, each in process_generators().items()}
    found: dict[str, int] = {}
    for path, each in (own | generators_of(dataset)).items():
        with suppress(Exception):  # on a device that this process cannot use
            found[path] = standing(each).at
    return found


def scalars_of(dataset: Any) -> dict[str, Any]:
    """Numbers and short texts that a dataset holds, by path."""
    return copy_state(dataset).scalars
