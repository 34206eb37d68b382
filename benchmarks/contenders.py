"""The loaders that are compared: a table of names and what makes the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

Factory = Callable[[Dataset[Any], Mapping[str, Any], Path], Iterable[Any]]
"""Dataset, the loader's arguments and an empty folder for what the loader may write."""

REFERENCE = "stock"
AS_IT_COMES = "safe"
"""The one that is held to the bars; those that do more are held to the floor of a case."""


def _stock(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    return DataLoader(dataset, **kwargs)


# The package is imported on demand: the stock loader against itself needs none of it.
# `trace` is given outright, so that SAFELOADER_TRACE in the environment does not change a result.


def _safe(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=False)


def _safe_trace(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=folder)


def _safe_run(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=False, run_dir=folder / "run")


def _safe_checksum(
    dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path
) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=False, checksum=True)


def _torch_way(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=False, transport="torch")


def _launcher(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    """A stock loader as it is in a program that `python -m safeloader run` started.

    There the hook puts these methods into torch's class, once for all. Here a class of its own has
    them, so that the stock loader beside it stays what it is.
    """
    from safeloader import beside
    from safeloader.provenance.events import listeners

    class Launched(DataLoader[Any]):
        def __iter__(self) -> Any:
            return beside.iterate(self, DataLoader.__iter__)

        def _get_iterator(self) -> Any:
            listeners.append(beside.listens)  # for the report: of this loader's epochs alone
            try:
                return beside.get_iterator(self, DataLoader._get_iterator)
            finally:
                listeners.remove(beside.listens)

    return Launched(dataset, **kwargs)


CONTENDERS: dict[str, Factory] = {
    REFERENCE: _stock,
    # The stock loader once more: its ratio is 1 by nature, its interval is this machine's noise.
    "null": _stock,
    "safe": _safe,
    "safe+trace": _safe_trace,
    "safe+run": _safe_run,
    "safe+checksum": _safe_checksum,
    # Everything but the transport: against `safe`, what the transport is worth.
    "torch-way": _torch_way,
    # The other way in: against `safe`, what it costs to be recorded from beside.
    "launcher": _launcher,
}
