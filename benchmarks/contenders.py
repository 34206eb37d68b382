"""The loaders that are compared: a table of names and what makes the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

Factory = Callable[[Dataset[Any], Mapping[str, Any], Path], Iterable[Any]]
"""Dataset, the loader's arguments and an empty folder for what the loader may write."""

REFERENCE = "stock"


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


def _safe_checksum(
    dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path
) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=False, checksum=True)


def _torch_way(dataset: Dataset[Any], kwargs: Mapping[str, Any], folder: Path) -> DataLoader[Any]:
    from safeloader import SafeDataLoader

    return SafeDataLoader(dataset, **kwargs, trace=False, transport="torch")


CONTENDERS: dict[str, Factory] = {
    REFERENCE: _stock,
    # The stock loader once more: its ratio is 1 by nature, its interval is this machine's noise.
    "null": _stock,
    "safe": _safe,
    "safe+trace": _safe_trace,
    "safe+checksum": _safe_checksum,
    # Everything but the transport: against `safe`, what the transport is worth.
    "torch-way": _torch_way,
}
