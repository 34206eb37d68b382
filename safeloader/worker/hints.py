"""What to do next about a failure of the user's code; runs where it happened."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

from safeloader.wire.shortage import shortage

KEY_FAULT = "raised by key=, not by the dataset"


def hint_for(exc: BaseException, phase: str, index: Any, found: str, dataset: Any = None) -> str:
    """Lines: what was found out beyond the exception, and last the next step."""
    short = shortage(exc)
    if short is not None:
        return "\n".join(part[:1000] for part in (found, short) if part)
    parts = [found] if found else []
    if type(index) is int:
        parts += _about_index(index, dataset, exc)
    in_stream = type(index) is tuple and len(index) == 2
    if isinstance(exc, StopIteration) and phase == "sample":
        parts.append(
            "a StopIteration left the dataset (a bare next() in it?); torch's own loader would "
            "have ended the epoch here without a word"
        )
    if found == KEY_FAULT:
        parts.append(
            "loader.key(loader.dataset[index]) repeats it; a key is an int, str or tuple of them"
        )
    elif phase == "sample" and index is not None and not in_stream:
        parts.append(
            f"loader.replay(error) repeats the call here with the same random numbers, "
            f"loader.dataset[{index!r}] with others"
        )
    elif phase == "sample" and in_stream:
        parts.append(
            f"sample {index[1]} (from 0) of worker {index[0]}'s stream: iterate the dataset in the "
            "main process up to it to repeat the call"
        )
    elif phase == "collate" and not found:
        parts.append(
            "the samples are alike in structure; loader.collate_fn([loader.dataset[i] for i in "
            "error.failure.indices]) repeats the call here"
        )
    elif phase == "collate":
        parts.append("mend the sample, or give the loader a collate_fn that can take it")
    elif phase == "transport" and not found:
        parts.append(
            "pickle.dumps(loader.collate_fn([loader.dataset[i] for i in error.failure.indices])) "
            "may repeat it here"
        )
    elif phase == "init":
        parts.append("no sample was fetched yet: call worker_init_fn by itself to repeat it")
    return "\n".join(part[:1000] for part in parts)


def _about_index(index: int, dataset: Any, exc: BaseException) -> list[str]:
    """What the index means to the dataset under a Subset; whether it is out of its range."""
    said = []
    try:
        if isinstance(exc, IndexError) and not -len(dataset) <= index < len(dataset):
            said.append(
                f"index {index} is outside the dataset (length {len(dataset)}): look at the sampler"
            )
        inner: Any = dataset
        at = index
        while type(inner) is Subset:
            inner, at = inner.dataset, int(inner.indices[at])
        if inner is not dataset:
            said.append(f"index {index} of the Subset is index {at} of the dataset under it")
    except Exception:  # a hint must not hide the error
        return said
    return said
