"""The way to a worker: what is put in comes out, in order, and nothing waits for its reader."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
import time
from typing import Any

import pytest
import torch

from safeloader.transport.channel import TaskQueue
from safeloader.transport.messages import SamplerFault, Task


def refuses(task: Task, exc: Exception) -> Task:
    raise AssertionError(f"{task} was refused: {exc}")


def echo(tasks: TaskQueue, answers: Any) -> None:
    while (item := tasks.get(timeout=300)) is not None:
        answers.put(item)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_is_put_comes_out_in_order(method: str) -> None:
    context = multiprocessing.get_context(method)
    tasks, answers = TaskQueue(refuses), context.Queue()
    items = [
        (0, Task(0, [1, 2, 3])),
        (1, Task(1, list(range(100_000)))),  # more than a pipe holds
        (2, Task(2, "name", excluded=(1,), one_by_one=True)),
        (3, Task(3, [])),
    ]
    process = context.Process(target=echo, args=(tasks, answers), daemon=True)
    process.start()
    for item in items:
        tasks.put(item)
    tasks.put(None)
    assert [answers.get(timeout=300) for _ in items] == items
    process.join(30)
    assert process.exitcode == 0
    tasks.close()


def test_a_tensor_may_be_an_index() -> None:
    tasks = TaskQueue(refuses)
    tasks.put((0, Task(0, torch.arange(3))))
    number, task = tasks.get(timeout=300)
    assert (number, task.seq, task.index.tolist()) == (0, 0, [0, 1, 2])


def test_putting_never_waits_for_the_reader() -> None:
    tasks = TaskQueue(refuses)
    for number in range(50):
        tasks.put((number, Task(number, list(range(10_000)))))  # some MB, and nobody reads
    assert [tasks.get(timeout=300)[0] for _ in range(50)] == list(range(50))


def test_nothing_there_is_told_as_by_any_queue() -> None:
    with pytest.raises(queue.Empty):
        TaskQueue(refuses).get(timeout=0)


def test_what_cannot_be_pickled_is_replaced() -> None:
    refused = []

    def refuse(task: Task, exc: Exception) -> Task:
        refused.append((task.seq, type(exc)))
        return Task(task.seq, SamplerFault())

    tasks = TaskQueue(refuse)
    tasks.put((4, Task(7, [threading.Lock()])))
    assert tasks.get(timeout=300) == (4, Task(7, SamplerFault()))
    assert refused == [(7, TypeError)]


def test_a_closed_queue_takes_what_comes_and_drops_it() -> None:
    tasks = TaskQueue(refuses)
    tasks.cancel_join_thread()
    tasks.close()
    tasks.put((0, Task(0, [1])))
    tasks.close()


def test_no_thread_outlives_its_queue() -> None:
    before = threading.active_count()
    tasks = TaskQueue(refuses)
    tasks.put((0, bytes(1_000_000)))
    assert threading.active_count() == before + 1
    tasks.close()
    give_up = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert threading.active_count() == before


class ClosesLate:
    """As torch's iterator in a cycle that the collector finalises after the pipe's ends."""

    def __init__(self, tasks: TaskQueue) -> None:
        self.tasks = tasks
        self.itself = self

    def __del__(self) -> None:
        opened.append(os.open(os.devnull, os.O_RDONLY))
        opened.append(os.open(os.devnull, os.O_RDONLY))
        self.tasks.close()


opened: list[int] = []


def test_a_descriptor_is_closed_once_in_whatever_order_the_collector_finalises() -> None:
    ClosesLate(TaskQueue(refuses))  # the older is finalised first
    gc.collect()
    first, second = opened
    os.close(first)  # still ours
    os.close(second)
