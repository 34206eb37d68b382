"""Real processes of a gloo group draw one global order between them, each index once."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safeloader import GlobalBatchSampler
from tests.processes.test_launcher import PATIENCE_S, surroundings

LENGTH, GLOBAL_BATCH, SEED, EPOCHS = 27, 8, 5, 2
TAILS = ("drop", "pad", "uneven")

PROGRAM = f"""\
import json, sys
from torch import distributed
from safeloader import GlobalBatchSampler, SafeDataLoader

if __name__ == "__main__":
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    loaders = {{}}
    for tail in {TAILS}:  # before there is a group, as many programs do
        sampler = GlobalBatchSampler({LENGTH}, {GLOBAL_BATCH}, seed={SEED}, tail=tail)
        loaders[tail] = SafeDataLoader(range({LENGTH}), batch_sampler=sampler, num_workers=1)
    distributed.init_process_group(
        "gloo", init_method="file://" + store, rank=rank, world_size=world
    )
    told = {{}}
    for tail, loader in loaders.items():
        told[tail] = []
        for epoch in range({EPOCHS}):
            loader.batch_sampler.set_epoch(epoch)
            batches = [batch.tolist() for batch in loader]
            everybodys = [None] * world
            distributed.all_gather_object(everybodys, batches)
            length, audit = len(loader), loader.audit
            told[tail].append([batches, everybodys, length, str(audit), audit.to_dict()])
    with open(out, "w") as file:
        json.dump(told, file)
    distributed.destroy_process_group()
"""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank told of each tail and epoch."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(PROGRAM)
    clean = surroundings(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    for name in ("RANK", "WORLD_SIZE"):  # the group alone knows
        clean.pop(name, None)
    words = [str(request.param), str(folder / "store")]
    running = [
        subprocess.Popen(
            [sys.executable, "train.py", str(rank), *words, f"told.{rank}"],
            cwd=folder,
            env=clean,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]
    try:
        said = [each.communicate(timeout=PATIENCE_S)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0] * request.param, said
    return [json.loads((folder / f"told.{rank}").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("tail", TAILS)
def test_ranks_share_the_batches_of_one(ranks: list[Any], tail: Any, epoch: int) -> None:
    one = GlobalBatchSampler(LENGTH, GLOBAL_BATCH, 0, 1, seed=SEED, tail=tail)
    told = [each[tail][epoch] for each in ranks]
    shares = [batches for batches, *_ in told]
    split = itertools.zip_longest(*shares, fillvalue=[])
    assert [[*itertools.chain(*parts)] for parts in split] == list(one.batches(epoch))
    for batches, everybodys, length, _, _ in told:
        assert (everybodys, length) == (shares, len(batches))


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("tail", TAILS)
def test_their_audits_together_have_each_index_once(
    ranks: list[Any], tail: str, epoch: int
) -> None:
    world = len(ranks)
    seen: list[int] = []
    for rank, each in enumerate(ranks):
        batches, _, _, text, audit = each[tail][epoch]
        delivered = [*itertools.chain(*batches)]
        seen += delivered + audit["dropped"]
        assert text.startswith(f"epoch {epoch}, rank {rank} of {world}: complete, ok;")
        assert "never drawn" not in text
        assert (audit["rank"], audit["shard"]) == (rank, [rank, world])
        assert audit["delivered"] == len(delivered)
        assert audit["elsewhere"] == LENGTH - len({*delivered, *audit["dropped"]})
        assert audit["padding"] == (5 if tail == "pad" else 0)
        assert ("padding: 5 indices" in text) == (tail == "pad")
        assert audit["notes"] == []
    padding = 5 if tail == "pad" else 0
    again = [index for index in seen if seen.count(index) > 1]
    assert len(seen) == LENGTH + padding
    assert (set(seen), len(set(again))) == (set(range(LENGTH)), padding)
    dropped = sum(len(each[tail][epoch][4]["dropped"]) for each in ranks)
    assert dropped == (LENGTH % GLOBAL_BATCH if tail == "drop" else 0)
