"""The table as other libraries take it: Arrow, pandas, files. Runs in: main.

Each is imported where it is used. What can be written in parts is, and takes the memory of a part.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safeloader.provenance.columns import (
    Columns,
    as_table,
    columns_of,
    has_objects,
    in_chunks,
    text_of_index,
)
from safeloader.provenance.epoch_facts import FactsOfEpochs
from safeloader.provenance.recorder import Delivery


class Exports:
    """The table of some batches, to be given away.

    Args:
        deliveries: the batches, oldest first.
        facts: what holds for their epochs.
    """

    def __init__(self, deliveries: list[Delivery], facts: FactsOfEpochs) -> None:
        self._deliveries, self._facts = deliveries, facts

    def chunks(self) -> Iterator[Columns]:
        """The table in parts."""
        return in_chunks(self._deliveries, self._facts)

    def arrow(self) -> Any:
        """A ``pyarrow.RecordBatchReader``, which makes each part as it is asked for.

        Raises:
            ImportError: without pyarrow.
        """
        try:
            import pyarrow
        except ImportError as exc:
            raise ImportError(
                "provenance goes to Arrow by pyarrow: pip install 'safeloader[parquet]', or take "
                "provenance.to_numpy()"
            ) from exc
        texts = any(map(has_objects, self._deliveries))  # one type for the whole column
        kinds = {
            name: pyarrow.string() if texts and name == "index" else pyarrow.int64()
            for name in columns_of((), self._facts)
        }
        schema = pyarrow.schema(kinds)

        def batches() -> Iterator[Any]:
            for chunk in self.chunks():
                if texts:
                    shown = [text_of_index(index) for index in chunk["index"].tolist()]
                    chunk["index"] = np.array(shown, dtype=object)
                arrays = [pyarrow.array(chunk[name], type=kind) for name, kind in kinds.items()]
                yield pyarrow.RecordBatch.from_arrays(arrays, schema=schema)

        return pyarrow.RecordBatchReader.from_batches(schema, batches())

    def pandas(self) -> Any:
        """A ``pandas.DataFrame``.

        Raises:
            ImportError: without pandas.
        """
        try:
            import pandas
        except ImportError as exc:
            raise ImportError(
                "to_pandas() needs pandas: pip install pandas, or take provenance.to_numpy()"
            ) from exc
        return pandas.DataFrame(columns_of(self._deliveries, self._facts))

    def save(self, target: Path) -> None:
        """Write a file; see :meth:`~safeloader.provenance.table.Provenance.save`."""
        suffix = target.suffix.lower()
        if suffix == ".npy":
            table = _without_objects(as_table(columns_of(self._deliveries, self._facts)))
            with target.open("wb") as file:  # given a path, numpy would add a suffix of its own
                np.save(file, table, allow_pickle=False)
        elif suffix == ".parquet":
            self._save_parquet(target)
        elif suffix == ".csv":
            with target.open("w", newline="", encoding="utf-8") as text:
                writer = csv.writer(text)
                writer.writerow(columns_of((), self._facts))
                for chunk in self.chunks():
                    if chunk["index"].dtype.hasobject:
                        chunk["index"] = np.array(
                            [*map(text_of_index, chunk["index"])], dtype=object
                        )
                    writer.writerows(zip(*(each.tolist() for each in chunk.values()), strict=True))
        elif suffix == ".jsonl":
            with target.open("w", encoding="utf-8") as text:
                for chunk in self.chunks():
                    for row in zip(*(column.tolist() for column in chunk.values()), strict=True):
                        named = dict(zip(chunk, row, strict=True))
                        text.write(json.dumps(named, default=text_of_index) + "\n")
        else:
            raise ValueError(
                "provenance is saved as .npy, .csv, .jsonl or .parquet, by the suffix of the "
                f"path; got {str(target)!r}"
            )

    def _save_parquet(self, target: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError as exc:
            raise ImportError(
                "saving provenance as .parquet needs pyarrow: pip install 'safeloader[parquet]', "
                "or save as .npy, .csv or .jsonl"
            ) from exc
        reader = self.arrow()
        with pyarrow.parquet.ParquetWriter(target, reader.schema) as file:
            for batch in reader:
                file.write_batch(batch)


def _without_objects(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The table, with indices that are not ints as text."""
    if not table.dtype.hasobject:
        return table
    texts = np.array([text_of_index(index) for index in table["index"]])
    table["index"] = texts
    names = table.dtype.names or ()
    return table.astype([(name, texts.dtype if name == "index" else np.int64) for name in names])
