"""What an audit over ranks takes of a very long epoch: `python -m benchmarks.across_ranks`.

A simulation in one process: a thousand million indices, scattered over the dataset, dealt out to 8
ranks. Each rank has the map of draws that its loader would have; one of them is filled batch by
batch, as a loader fills it. Then the parts are made and merged, and damage is looked for by the
rounds in which ranks ask each other. What is not in it is the network: the bytes are told.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import RESULTS, keep, markdown
from safeloader import AuditPart, RunAudit, merge_audits
from safeloader.delivery.across_ranks import audit_of
from safeloader.delivery.bisecting import HEAD_BYTES, resolve
from safeloader.delivery.coverage import Coverage
from safeloader.delivery.ladder import Delivered
from safeloader.delivery.merging import Merging

SAMPLES, QUICK_SAMPLES, RANKS, BATCH = 1_000_000_000, 2_000_000, 8, 64
_CHUNK = 1 << 22
_STEP = 618_033_989  # prime: the places of an epoch's order, one after the other, lie far apart
NONE = np.empty(0, np.int64)
BARS = {"part_bytes": 4_200, "part_s": 5.0, "merge_s": 5.0, "few_s": 10.0, "round_bytes": 1 << 16}


def order(first: int, last: int, rank: int, samples: int, ranks: int) -> Any:
    """The indices that a rank draws as its numbers ``first`` to ``last - 1``."""
    places = np.arange(first, last, dtype=np.int64) * ranks + rank
    return (places * _STEP + 7) % samples


def drawn(rank: int, samples: int, ranks: int, at_once: int) -> Coverage:
    """The map of a rank that has drawn its share, so many indices at once."""
    coverage = Coverage()
    coverage.expect(samples)
    share = len(range(rank, samples, ranks))
    for first in range(0, share, _CHUNK):
        indices = order(first, min(first + _CHUNK, share), rank, samples, ranks)
        if at_once >= _CHUNK:  # in their order they are taken in faster, to the same outcome
            indices = np.sort(indices)
        for begin in range(0, indices.size, at_once):
            coverage.add(indices[begin : begin + at_once].tobytes())
    coverage.flush()
    return coverage


def part_of(rank: int, ranks: int, samples: int, delivered: Delivered) -> AuditPart:
    """As a rank makes it of its map."""
    ladder = delivered.ladder(samples)
    number = ladder.count
    return AuditPart(rank, ranks, 0, True, True, number, number, length=samples, ladder=ladder)


class Together:
    """All ranks in one process, what they say, and how long each took to say it."""

    def __init__(self, delivered: Sequence[Delivered]) -> None:
        self._delivered = delivered
        self.rounds = self.bytes_a_rank = self.most_bytes = 0
        self.seconds_a_rank = 0.0

    def exchange(self, say: Callable[[Delivered], bytes], size: int) -> dict[int, bytes]:
        self.rounds += 1
        self.bytes_a_rank += size + HEAD_BYTES
        self.most_bytes = max(self.most_bytes, size + HEAD_BYTES)
        told, slowest = {}, 0.0
        for rank, each in enumerate(self._delivered):
            began = time.perf_counter()
            told[rank] = say(each)
            slowest = max(slowest, time.perf_counter() - began)
        self.seconds_a_rank += slowest
        return told


def asked(
    delivered: Sequence[Delivered], parts: list[AuditPart]
) -> tuple[RunAudit, Together, float]:
    """The audit with every index asked for that can be; and seconds as each rank has them."""
    together = Together(delivered)
    began = time.perf_counter()
    merging = Merging(parts, range(len(parts)), can_ask=True)
    resolve(together, merging)
    run = audit_of(merging)
    spent = time.perf_counter() - began
    others = together.seconds_a_rank * (len(delivered) - 1)  # at the same time, on other machines
    return run, together, max(together.seconds_a_rank, spent - others)


def simulated(samples: int, ranks: int) -> dict[str, Any]:
    """Fill the maps, make the parts, merge, and look for damage."""
    facts: dict[str, Any] = {"samples": samples, "ranks": ranks}
    maps = []
    for rank in range(ranks):
        began = time.process_time()
        maps.append(drawn(rank, samples, ranks, BATCH if rank == 0 else _CHUNK))
        if rank == 0:
            share = len(range(0, samples, ranks))
            facts["map_ns_a_sample"] = (time.process_time() - began) / share * 1e9
            facts["map_bytes"] = maps[0]._seen._bits.nbytes
        print(f"rank {rank} has drawn", file=sys.stderr)
    rng = np.random.default_rng(1)
    lost = np.unique(order(0, 20, 3, samples, ranks)[:10])
    again = np.unique(rng.integers(0, samples, 5))
    whole = [each.multiset(samples, NONE, NONE) for each in maps]
    damaged = [
        each.multiset(samples, lost if rank == 3 else NONE, again if rank == 5 else NONE)
        for rank, each in enumerate(maps)
    ]
    swapped = [*whole[:6], whole[5], *whole[7:]]  # rank 6 has the share of rank 5

    began = time.perf_counter()
    parts = [part_of(0, ranks, samples, _known(whole[0]))]
    facts["part_s"] = time.perf_counter() - began
    facts["part_bytes"] = len(parts[0].to_bytes())
    parts += [part_of(rank, ranks, samples, _known(whole[rank])) for rank in range(1, ranks)]
    began = time.perf_counter()
    run = merge_audits(parts)
    facts["merge_s"] = time.perf_counter() - began
    _see(run.ok, run)
    facts["whole"] = run.answer

    few = [part_of(rank, ranks, samples, _known(each)) for rank, each in enumerate(damaged)]
    began = time.perf_counter()
    merged = merge_audits(few)
    facts["few_merge_s"] = time.perf_counter() - began
    facts["few_merged"] = {
        "ok": merged.ok,
        "named": merged.twice.size + merged.never.size,
        "in ranges": len(merged.ranges),
    }
    run, together, seconds = asked([_known(each) for each in damaged], few)
    _see(run.exact and run.ok is False, run)
    _see([run.never.tolist(), run.twice.tolist()] == [lost.tolist(), again.tolist()], run)
    facts["few"] = _told(run, together, seconds)

    much = [part_of(rank, ranks, samples, _known(each)) for rank, each in enumerate(swapped)]
    run, together, seconds = asked([_known(each) for each in swapped], much)
    _see(run.ok is False and run.counts["never"] == len(range(6, samples, ranks)), run)
    facts["much"] = _told(run, together, seconds)
    return facts


def _known(delivered: Delivered | None) -> Delivered:
    if delivered is None:
        raise RuntimeError("what a rank handed over is not known")
    return delivered


def _see(holds: bool | None, run: RunAudit) -> None:
    if not holds:
        raise RuntimeError(f"the audit is wrong, so its time tells nothing: {run}")


def _told(run: RunAudit, together: Together, seconds: float) -> dict[str, Any]:
    return {
        "answer": run.answer,
        "counts": run.counts,
        "exact": run.exact,
        "listed": run.twice.size + run.never.size,
        "rounds": together.rounds,
        "bytes_a_rank": together.bytes_a_rank,
        "most_bytes_a_round": together.most_bytes,
        "seconds": seconds,
    }


def rows_of(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """What is told, with the bar where there is one."""
    few, much = facts["few"], facts["much"]
    most = max(few["most_bytes_a_round"], much["most_bytes_a_round"])

    def row(what: str, value: float, unit: str, bar: str = "") -> tuple[str, ...]:
        told = f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.2f}"
        if not bar:
            return what, f"{told} {unit}", "", ""
        return what, f"{told} {unit}", f"{BARS[bar]:,}", "ok" if value <= BARS[bar] else "ABOVE"

    return [
        row("map of draws, a rank", facts["map_bytes"] / 2**20, "MiB"),
        row("map of draws, batch by batch, a sample", facts["map_ns_a_sample"], "ns"),
        row("a part", facts["part_bytes"], "bytes", "part_bytes"),
        row("to make a part", facts["part_s"], "s", "part_s"),
        row("to merge all parts", facts["merge_s"], "s", "merge_s"),
        row("10 lost and 5 twice: to merge", facts["few_merge_s"], "s"),
        row("... of these named by the parts alone", facts["few_merged"]["named"], "indices"),
        row("... to name all by asking", few["seconds"], "s", "few_s"),
        row("... rounds", few["rounds"], ""),
        row("... sent by a rank", few["bytes_a_rank"], "bytes"),
        row("a share twice, another never: asking", much["seconds"], "s"),
        row("... rounds", much["rounds"], ""),
        row("... sent by a rank", much["bytes_a_rank"], "bytes"),
        row("the most that a rank sends in a round", most, "bytes", "round_bytes"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print and write; with `--check`, the status is 1 if one is above its bar."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.across_ranks", description="Audits over ranks, simulated."
    )
    add: Any = parser.add_argument
    add("--samples", type=int, help=f"of the dataset ({SAMPLES:,}; with --quick {QUICK_SAMPLES:,})")
    add("--ranks", type=int, default=RANKS, help=f"7 or more ({RANKS})")
    add("--quick", action="store_true", help="few samples, no files")
    add("--out", type=Path, help=f"folder for results (default: {RESULTS.name}/ beside this file)")
    add("--check", action="store_true", help="exit 1 if one is above its bar")
    options = parser.parse_args(arguments)
    if options.ranks < 7:
        parser.error("--ranks must be 7 or more: ranks 3, 5 and 6 are damaged")
    samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    facts = simulated(samples, options.ranks)
    rows = rows_of(facts)
    text = markdown((f"{samples:,} indices on {options.ranks} ranks", "", "bar", ""), rows)
    for name in ("few", "much"):
        text += f"\n{facts[name]['answer']}\n"
    print(text)
    keep("across-ranks", options, facts, text)
    above = any(row[3] == "ABOVE" for row in rows)
    return 1 if options.check and above else 0


if __name__ == "__main__":
    sys.exit(main())
