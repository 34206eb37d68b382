"""Hypothesis strategies: the space of loader modes, with a dataset for each."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler, Subset

from tests import datasets as d


@st.composite
def modes(draw: st.DrawFn, workers: st.SearchStrategy[int]) -> dict[str, Any]:
    """Names and numbers that ``make_loader`` turns into a loader, the same one each time."""
    num_workers = draw(workers)
    batch_size = draw(st.none() | st.integers(1, 7))
    return {
        "kind": draw(st.sampled_from(["map", "together", "subset", "stream", "uneven", "pipe"])),
        "length": draw(st.integers(0, 25)),
        "batch_size": batch_size,
        "drop_last": draw(st.booleans()) and batch_size is not None,
        "order": draw(st.sampled_from(["sequential", "shuffle", "sampler", "batch_sampler"])),
        "num_workers": num_workers,
        "prefetch_factor": draw(st.integers(1, 4)) if num_workers else None,
        "persistent_workers": draw(st.booleans()) and num_workers > 0,
        "pin_memory": draw(st.booleans()),
        "worker_init": draw(st.booleans()) and num_workers > 0,
        "leave_after": draw(st.none() | st.integers(0, 4)),
    }


def make_loader(loader_class: type, mode: dict[str, Any], **extra: Any) -> Any:
    """The loader of ``mode``, of either class."""
    length = mode["length"]
    dataset: Any = {
        "map": lambda: d.Noisy(length),
        "together": lambda: d.Together(length),
        "subset": lambda: Subset(d.Noisy(length + 3), range(length)),
        "stream": lambda: d.Stream(length),
        "uneven": lambda: d.Stream(length, uneven=True),
        "pipe": d.datapipe,
    }[mode["kind"]]()
    settings = {
        name: mode[name]
        for name in ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")
    }
    settings["worker_init_fn"] = d.worker_init if mode["worker_init"] else None
    batching = {"batch_size": mode["batch_size"], "drop_last": mode["drop_last"]}
    if mode["kind"] in ("map", "together", "subset"):
        size = mode["batch_size"] or 2
        if mode["order"] == "shuffle" and length:
            batching["shuffle"] = True
        elif mode["order"] == "sampler":
            batching["sampler"] = d.GreedySampler(length)
        elif mode["order"] == "batch_sampler":
            inner = RandomSampler(dataset) if length else SequentialSampler(dataset)
            batching = {"batch_sampler": BatchSampler(inner, size, mode["drop_last"])}
    return loader_class(dataset, **batching, **settings, **extra)
