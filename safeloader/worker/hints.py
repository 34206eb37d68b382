"""What to do next about a failure of the user's code; runs where it happened."""

from __future__ import annotations

from typing import Any


def hint_for(exc: BaseException, phase: str, index: Any, found: str) -> str:
    """Lines: what was found out beyond the exception, and last the next step."""
    parts = [found] if found else []
    in_stream = type(index) is tuple and len(index) == 2
    if isinstance(exc, StopIteration) and phase == "sample":
        parts.append(
            "a StopIteration left the dataset (a bare next() in it?); torch's own loader would "
            "have ended the epoch here without a word"
        )
    if phase == "sample" and index is not None and not in_stream:
        parts.append(
            f"loader.dataset[{index!r}] repeats the call here, under a debugger if need be"
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
    elif phase == "init":
        parts.append("no sample was fetched yet: call worker_init_fn by itself to repeat it")
    return "\n".join(part[:1000] for part in parts)
