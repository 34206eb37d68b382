"""Audits over ranks in real processes of a gloo group, each case under a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.processes.test_launcher import PATIENCE_S, surroundings

LENGTH, WORLD, ABSENT_AFTER_S, LIMIT_S = 1003, 3, 2.0, 30.0

PROGRAM = f"""\
import datetime, json, os, signal, sys, time
from torch import distributed
from torch.utils.data import DistributedSampler, Subset
from safeloader import RunAudit, SafeDataLoader, audit_across_ranks, merge_audits

LENGTH, ABSENT_AFTER_S = {LENGTH}, {ABSENT_AFTER_S}
DATA = list(range(LENGTH))


def share(data=DATA, epoch=1, **more):
    sampler = DistributedSampler(data, **more)
    sampler.set_epoch(epoch)
    return sampler


def loader(sampler=None, data=DATA, **more):
    return SafeDataLoader(data, 16, sampler=sampler, **more)


def read(loader, most=None):
    for number, _ in enumerate(loader, 1):
        if number == most:
            break
    return loader


def padding(rank):
    return read(loader(share(), num_workers=1))


def drop_last(rank):
    return read(loader(share(drop_last=True)))


def double_sharding(rank):
    mine = Subset(DATA, range(rank, LENGTH, 3))  # a dataset of this rank's own
    return read(loader(share(mine), mine))


def sharded_again(rank):
    return read(loader(list(share())[rank::3]))


def no_sampler(rank):
    return read(loader())


def other_epoch(rank):
    return read(loader(share(epoch=1 + (rank == 2))))


def stops_early(rank):
    return read(loader(share(), num_workers=1), most=4 if rank == 1 else None)


CASES = (
    padding, drop_last, double_sharding, sharded_again, no_sampler, other_epoch, stops_early
)


def told(audit, began):
    return {{
        "text": str(audit),
        "facts": audit.to_dict() | {{"absent": list(audit.absent)}},
        "seconds": time.monotonic() - began,
    }}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    distributed.init_process_group(
        "gloo", init_method="file://" + folder + "/store", rank=rank, world_size={WORLD}
    )
    world = distributed.group.WORLD
    store = distributed.FileStore(folder + "/parts", {WORLD})
    out = {{}}
    for case in CASES:
        recorded = case(rank)
        began = time.monotonic()
        out[case.__name__] = told(audit_across_ranks(recorded, world, timeout_s=20), began)
        assert recorded.audit_part().put(store, case.__name__)
        parts = [None] * {WORLD}
        distributed.all_gather_object(parts, recorded.audit_part())
        assert str(merge_audits(parts)) == out[case.__name__]["text"]
        began = time.monotonic()
        out["store " + case.__name__] = told(
            RunAudit.from_store(store, case.__name__, {WORLD}, timeout_s=20), began
        )
    recorded = padding(rank)
    gone, hangs, dies = [distributed.new_group() for _ in range(3)]
    if rank != 2:
        began = time.monotonic()
        out["never comes"] = told(audit_across_ranks(recorded, gone, ABSENT_AFTER_S), began)
        assert recorded.audit_part().put(store, "absent")
        began = time.monotonic()
        out["store never comes"] = told(
            RunAudit.from_store(store, "absent", {WORLD}, ABSENT_AFTER_S), began
        )
    if rank == 2:
        distributed.monitored_barrier(hangs)
    else:
        began = time.monotonic()
        out["hangs"] = told(audit_across_ranks(recorded, hangs, ABSENT_AFTER_S), began)
    distributed.barrier()
    if rank == 2:
        distributed.monitored_barrier(dies)
    else:
        began = time.monotonic()
        out["dies"] = told(audit_across_ranks(recorded, dies, ABSENT_AFTER_S), began)
    with open(folder + "/told." + str(rank), "w") as file:
        json.dump(out, file)
    os.rename(folder + "/told." + str(rank), folder + "/told." + str(rank) + ".json")
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)  # the group cannot be taken down: rank 2 is gone
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank told of each case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(PROGRAM)
    clean = surroundings(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    for name in ("RANK", "WORLD_SIZE"):  # the group alone knows
        clean.pop(name, None)
    running = [
        subprocess.Popen(
            [sys.executable, "train.py", str(rank), str(folder)],
            cwd=folder,
            env=clean,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [each.communicate(timeout=PATIENCE_S)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0, 0, -signal.SIGKILL], said
    return [json.loads((folder / f"told.{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(params=["", "store "])
def case_of(request: pytest.FixtureRequest, ranks: list[dict[str, Any]]) -> Any:
    """The facts and the text of a case, the same on each rank that came."""

    def find(name: str) -> tuple[dict[str, Any], str]:
        told = [each[request.param + name] for each in ranks if request.param + name in each]
        assert all(each["seconds"] < LIMIT_S for each in told)
        assert all(each["text"] == told[0]["text"] for each in told)
        return told[0]["facts"], told[0]["text"]

    return find


def test_the_padding_of_a_distributed_sampler(case_of: Any) -> None:
    facts, text = case_of("padding")
    assert (facts["ok"], facts["twice"], facts["padding"]) == (True, [486, 631], [486, 631])
    assert facts["by_rank"] == {"486": [1, 2], "631": [0, 1]}
    assert facts["never"] == []
    assert "ok, each of 1003 indices came, and 2 came twice as padding" in text


def test_what_drop_last_leaves_out(case_of: Any) -> None:
    facts, text = case_of("drop_last")
    assert (facts["ok"], facts["never"], facts["twice"]) == (True, [916], [])
    assert "never: 1: 916; 1 left out by drop_last of DistributedSampler" in text


@pytest.mark.parametrize("name", ["double_sharding", "sharded_again"])
def test_double_sharding(case_of: Any, name: str) -> None:
    facts, text = case_of(name)
    assert facts["ok"] is False
    assert facts["delivered"] - facts["counts"]["again"] + len(facts["never"]) == LENGTH
    assert facts["counts"]["never"] == len(facts["never"]) in (667, 668, 669)
    assert "is shared out once more" in text
    assert "next: share out once" in text


def test_no_sampler_on_any_rank(case_of: Any) -> None:
    facts, text = case_of("no_sampler")
    assert (facts["ok"], facts["twice"], facts["never"]) == (False, [*range(LENGTH)], [])
    assert {len(by) for by in facts["by_rank"].values()} == {3}
    assert "NOT OK: 1003 of 1003 indices came more than once" in text
    assert "each 3 times" in text
    assert "next: give each loader sampler=DistributedSampler(dataset)" in text


def test_another_epoch_on_one_rank(case_of: Any) -> None:
    facts, text = case_of("other_epoch")
    assert facts["ok"] is False
    assert len(facts["twice"]) > 100
    assert len(facts["never"]) > 100
    assert "had other epochs, and so other orders: ranks 0 and 1: 1; rank 2: 2" in text
    assert "next: call sampler.set_epoch(epoch) with the same number on all ranks" in text


def test_a_rank_that_stops_early(case_of: Any) -> None:
    facts, text = case_of("stops_early")
    assert (facts["ok"], facts["complete"]) == (False, False)
    assert facts["counts"]["never"] == len(facts["never"])
    assert "NOT OK: rank 1 stopped early" in text
    assert "rank 1 stopped early: 64 of 335 samples delivered" in text


def test_a_rank_that_never_comes(case_of: Any) -> None:
    facts, text = case_of("never comes")
    assert (facts["ok"], facts["absent"], facts["delivered"]) == (None, [2], 670)
    assert "cannot be told: rank 2 did not come" in text
    assert "next: see in the log of rank 2 where it is" in text


@pytest.mark.parametrize("name", ["dies", "hangs"])
def test_a_rank_that_goes_away_after_the_barrier(ranks: list[dict[str, Any]], name: str) -> None:
    for told in (ranks[0][name], ranks[1][name]):
        assert told["seconds"] < LIMIT_S
        assert (told["facts"]["ok"], told["facts"]["absent"]) == (None, [2])
        assert told["facts"]["delivered"] == 670


SERVER = """\
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_a_store_that_hangs_holds_nobody() -> None:
    from torch.distributed import TCPStore

    from safeloader import AuditPart, RunAudit

    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
            part = AuditPart.nothing(0, 2, "nothing was read")
            assert part.put(store, "epoch/0")
            run = RunAudit.from_store(store, "epoch/0", world=2, timeout_s=0.2)
            assert (run.absent, run.ok) == ((1,), None)
            os.kill(server.pid, signal.SIGSTOP)
            os.waitpid(server.pid, os.WUNTRACED)  # it stands still by now
            assert part.put(store, "epoch/1")
            run = RunAudit.from_store(store, "epoch/1", world=2, timeout_s=0.2)
            assert run.absent == (0, 1)
            assert "the store gave no answer" in str(run)
            os.kill(server.pid, signal.SIGCONT)
            for thread in threading.enumerate():  # what was left alone has its answer now
                if thread.name == "safeloader-store":
                    thread.join(LIMIT_S)
        finally:
            server.kill()
