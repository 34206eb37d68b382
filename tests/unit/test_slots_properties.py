"""Whatever a training loop does with its batches, what it holds stays as the worker made it."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from safeloader.transport.slot_table import FREE, GONE, HOLDS
from tests.wired import KB, MB, Child, Wired, filled, fork_in_c, print_of

sizes = st.sampled_from([16, 5 * KB, 40 * KB, 100 * KB, 200 * KB])
kinds = st.sampled_from(["stacked", "tensor", "array", "views", "parts", "shared"])

EXPORTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "view": lambda x: x[:].numpy(),
    "memoryview": lambda x: memoryview(x.numpy()),
    "dlpack": lambda x: np.from_dlpack(x[:]),  # of the tensor itself: torch's own ends with it
    "pickle": lambda x: memoryview(pickle.PickleBuffer(x.numpy())),
    "storage": lambda x: x[:],
}
OTHER_MEMORY: dict[str, Callable[[torch.Tensor], Any]] = {
    "shared": torch.Tensor.share_memory_,
    "storage shared": lambda x: x.untyped_storage().share_memory_(),
    "by name": lambda x: x.is_shared() or x.untyped_storage()._share_filename_cpu_(),
    "sent": ForkingPickler.dumps,
    "other storage": lambda x: x.set_(torch.ones(3, dtype=x.dtype)),
    "deep copy": copy.deepcopy,
    "saved": lambda x: torch.save([x, x[1:]], io.BytesIO()),
    "pickled": lambda x: pickle.dumps(x.numpy(), 5, buffer_callback=[].append),
    "resized": lambda x: refused(lambda: x.untyped_storage().resize_(0)),
    "grown": lambda x: refused(lambda: x.untyped_storage().resize_(10 * MB)),
}


def refused(what: Callable[[], Any]) -> None:
    """As by the stock loader's storages."""
    with pytest.raises(RuntimeError, match="not resizable"):
        what()


batches = st.lists(st.tuples(kinds, sizes), min_size=1, max_size=4)


class Loop(RuleBasedStateMachine):
    """A loop that holds, drops, slices, converts and forks, and a worker that goes on."""

    held_now = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[Any, int]] = {}  # what it is, and its print from the worker
        self.kept_by_worker: list[tuple[Any, int]] = []
        self.exported: list[tuple[Any, int]] = []
        self.over_arrays: set[int] = set()
        self.by_name: set[int] = set()  # addresses
        self.children: list[Child] = []
        self.number = 0

    @initialize(most=st.sampled_from([300 * KB, MB, 4 * MB]))
    def start(self, most: int) -> None:
        self.most = most
        self.wired = Wired(most)

    def hold(self, what: Any, expected: int) -> int:
        self.number += 1
        self.held[self.number] = what, expected
        return self.number

    def all_held(self) -> list[tuple[Any, int]]:
        return [*self.held.values(), *self.exported, *self.kept_by_worker]

    def made(self, kind: str, size: int) -> Any:
        """A leaf in the worker."""
        rows = [filled(size // 4, 7 * self.number + k) for k in range(4)]
        if kind == "stacked":
            return self.wired.stack(rows)
        whole = torch.stack(rows)
        if kind == "array":
            return whole.numpy()[:, ::-1]
        if kind == "views":
            return whole[1:]
        if kind == "parts":
            return whole.view(-1)[: size // 3]
        return whole.share_memory_() if kind == "shared" else whole

    @rule(leaves=batches, times=st.integers(1, 4))
    def go_on(self, leaves: list[tuple[str, int]], times: int) -> None:
        """Batches that nobody keeps."""
        for _ in range(times):
            self.number += 1
            self.wired.begin()
            batch = [self.made(kind, size) for kind, size in leaves]
            came = self.wired.open(self.wired.seal(batch))
            assert [print_of(leaf) for leaf in came] == [print_of(leaf) for leaf in batch]

    @rule(target=held_now, leaves=batches)
    def next_batch(self, leaves: list[tuple[str, int]]) -> int:
        self.wired.begin()
        batch = [self.made(kind, size) for kind, size in leaves]
        fingerprints = [print_of(leaf) for leaf in batch]
        came = self.wired.open(self.wired.seal(batch))
        for leaf, expected in zip(came[1:], fingerprints[1:], strict=True):
            self.hold(leaf, expected)
        return self.hold(came[0], fingerprints[0])

    @rule(kind=kinds, size=sizes)
    def collate_keeps_its_result(self, kind: str, size: int) -> None:
        self.wired.begin()
        leaf = self.made(kind, size)
        if kind != "shared":  # which main may write to
            self.kept_by_worker.append((leaf, print_of(leaf)))
        self.wired.open(self.wired.seal([leaf]))

    @rule()
    def worker_lets_go(self) -> None:
        self.kept_by_worker.clear()

    @rule(size=sizes)
    def batch_fails(self, size: int) -> None:
        self.wired.begin()
        batch = [self.made("stacked", size), self.made("tensor", size), lambda: None]
        try:
            self.wired.seal(batch)
        except Exception:
            return
        raise AssertionError("it was sealed")

    @rule(which=consumes(held_now))
    def drop(self, which: int) -> None:
        self.held.pop(which, None)

    @rule(target=held_now, which=held_now, start=st.integers(0, 3), step=st.integers(1, 3))
    def cut(self, which: int, start: int, step: int) -> Any:
        if which not in self.held:
            return multiple()
        piece = self.held[which][0][start::step]
        if which in self.over_arrays:
            self.over_arrays.add(self.number + 1)
        return self.hold(piece, print_of(piece))

    @rule(target=held_now, which=consumes(held_now))
    def convert(self, which: int) -> Any:
        if which not in self.held:
            return multiple()
        what, expected = self.held.pop(which)
        if isinstance(what, torch.Tensor):
            return self.hold(what.numpy(), expected)
        if all(step > 0 for step in what.strides):
            # Torch frees the array itself when such a storage is given other memory.
            self.over_arrays.add(self.number + 1)
            return self.hold(torch.from_numpy(what), expected)
        return self.hold(what, expected)

    @rule(
        which=held_now,
        hows=st.lists(st.sampled_from(sorted(EXPORTS)), max_size=2),
        then=st.sampled_from(sorted(OTHER_MEMORY)),
    )
    def export(self, which: int, hows: list[str], then: str) -> None:
        """What is exported is looked at from then on; the storage is given other memory."""
        what, expected = self.held.get(which, (None, 0))
        if isinstance(what, torch.Tensor) and what.numel():
            self.exported += [(EXPORTS[how](what), expected) for how in hows]
            # Torch itself unmaps memory with a name, under arrays over it, to share it without one.
            at = what.untyped_storage().data_ptr()
            unmapped = at in self.by_name and then in ("shared", "storage shared", "sent")
            if which not in self.over_arrays and not unmapped:
                OTHER_MEMORY[then](what)
            if then == "by name":
                self.by_name.add(what.untyped_storage().data_ptr())
            if then == "other storage":
                del self.held[which]

    @rule()
    def exports_go(self) -> None:
        del self.exported[::2]

    @precondition(lambda self: not self.children)  # they would see it, as with torch's own way
    @rule(which=held_now)
    def change(self, which: int) -> None:
        """In place; what shares its memory changes with it, in the worker too."""
        if which in self.held:
            self.held[which][0][...] = 5
        self.held = {k: (what, print_of(what)) for k, (what, _) in self.held.items()}
        self.exported = [(what, print_of(what)) for what, _ in self.exported]
        self.kept_by_worker = [(what, print_of(what)) for what, _ in self.kept_by_worker]

    @precondition(lambda self: len(self.children) < 2)
    @rule(lets_go=st.booleans(), fork=st.sampled_from([os.fork, fork_in_c]))
    def fork(self, lets_go: bool, fork: Any) -> None:
        def looked() -> bool:  # the child's own dictionary, as it was when it was forked
            return all(print_of(what) == at for what, at in self.all_held())

        self.children.append(Child(looked, fork=fork))
        if lets_go:
            self.held.clear()
            self.exported.clear()
            self.kept_by_worker.clear()

    @precondition(lambda self: self.children)
    @rule()
    def child_looks(self) -> None:
        assert self.children.pop(0).agrees()

    @invariant()
    def what_is_held_is_as_it_was_made(self) -> None:
        for what, expected in self.all_held():
            assert print_of(what) == expected

    @invariant()
    def slots_keep_to_their_bound(self) -> None:
        assert self.number == 0 or self.wired.table.share(0)[HOLDS] <= self.most

    def teardown(self) -> None:
        children, self.children = self.children, []
        agreed = [each.agrees() for each in children]
        try:
            assert all(agreed)
        finally:
            self.held.clear()
            self.exported.clear()
            self.kept_by_worker.clear()
        gc.collect()
        if hasattr(self, "wired"):
            assert set(self.wired.states) <= {FREE, GONE}


TestLoop = pytest.mark.slow(Loop.TestCase)
TestLoop.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking forks takes minutes
    suppress_health_check=list(HealthCheck),
)


def test_changes_reach_what_shares_memory_only() -> None:
    """The oracle above takes the prints again after a change: here they are known."""
    wired = Wired()
    batch = wired.send([filled(MB, 1), filled(MB, 2), np.ones(MB, np.uint8)])
    batch[0].fill_(9)
    assert batch[1].eq(2).all()
    assert (batch[2] == 1).all()
    assert wired.send(filled(MB, 3)).eq(3).all()
    assert batch[0].eq(9).all()
