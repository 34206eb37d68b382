"""What an epoch tells to other ranks, from its accounts. Runs in: main.

Made when somebody asks, and not before. Beside the sums it says what the sampler's share is, which
of its last draws are padding, and by a few digests whether the ranks' datasets are one: an index
means the same sample on two ranks only then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from zlib import crc32

import numpy as np
from torch.utils.data import Subset

from safeloader.delivery.audit import EpochAudit
from safeloader.delivery.audit_part import AuditPart, Beneath, RankAccounts
from safeloader.delivery.ladder import Delivered, Numbers
from safeloader.delivery.ledger import Ledger
from safeloader.failures.loader_log import length_of
from safeloader.introspect.copy_state import copy_state
from safeloader.introspect.ranks import Place
from safeloader.introspect.shard import Shard
from safeloader.introspect.sharding import purpose_of
from safeloader.introspect.underlying import Underlying, underlying
from safeloader.introspect.values import short_type_name, type_name

_CONTENTS_MAX = 4  # lists of a dataset that are compared
_BENEATH_MAX = 1 << 25  # samples under a Subset that are looked up
_NO_KEYS = "a stream without key= gives its samples no identity"
_OTHER_KEYS = "its keys have no text that is the same in every process"
_NAMES = "its indices are no whole numbers, and have no text that is the same in every process"
_TOO_MANY = (
    "which samples were left out, or drawn, is not known: they were too many to be listed, or an "
    "interrupt struck as they were noted"
)
_NOT_WHOLE = "its accounts do not come to what was handed over; print(loader.audit) tells more"


def rank_accounts(
    audit: EpochAudit,
    ledger: Ledger,
    at: Place,
    shard: Shard | None,
    read: tuple[Any, int | None],
    sampler: Any,
    *,
    alone: bool = False,
) -> RankAccounts:
    """The part of this rank, and the way to its indices.

    Args:
        audit: of the epoch.
        ledger: its accounts.
        at: where this process stands.
        shard: the share that its sampler had as the epoch began.
        read: the dataset, and its length as far as known.
        sampler: what the loader draws from.
        alone: whether there is no other rank, whose dataset would have to be the same.
    """
    dataset, length = read
    make = functools.partial(
        AuditPart.of, audit, at.rank or 0, at.world_size, shard=shard, length=length
    )
    known: dict[str, Any] = {
        "purpose": "" if audit.stream else purpose_of(sampler),
        "dataset": short_type_name(type_name(type(dataset))),
    }
    if audit.unchecked_since is not None:
        why = f"nothing was checked since batch {audit.unchecked_since}"
        return RankAccounts(make(unknown=why), _nobody_knows)
    digests = ledger.digests()
    if audit.stream or digests is not None:
        keyless = _NO_KEYS if not ledger.compares_keys else _OTHER_KEYS
        unknown = "" if digests is not None else keyless
        return RankAccounts(make(**known, digests=digests, unknown=unknown), _nobody_knows)
    delivered = ledger.handed_over(length)
    if delivered is None:
        return RankAccounts(make(**known, unknown=_TOO_MANY), _nobody_knows)
    ladder = delivered.ladder(length or 0)
    if ladder.count != audit.delivered + audit.delivered_before:
        names = not ladder.count and audit.delivered
        return RankAccounts(make(**known, unknown=_NAMES if names else _NOT_WHOLE), _nobody_knows)
    known["ladder"] = ladder
    if shard is not None and shard.pads_last and audit.complete:
        last = ledger.last_drawn(shard.pads_last)
        known["padded"] = tuple(index for index in last if type(index) is int and index >= 0)
    under = None
    if (shard is not None or at.world_size != 1) and not alone:
        under = _lookup(dataset, ladder.count)
        known["contents"] = _contents(dataset, length)
    below: Callable[[], Delivered] | None = None
    if under is not None and length is not None:
        bottom, way = under
        below = functools.partial(delivered.mapped, lambda indices: way.of_all(indices)[0])
        table = _digest(way, length)
        known["beneath"] = Beneath(table, bottom, below().ladder(bottom))
    return RankAccounts(
        make(**known),
        lambda beneath: delivered if not beneath else below() if below is not None else None,
    )


def _nobody_knows(beneath: bool) -> None:
    return None


def _lookup(dataset: Any, samples: int) -> tuple[int, Underlying] | None:
    """The length of the dataset under Subsets, and the way to it."""
    way = underlying(dataset) if type(dataset) is Subset and samples <= _BENEATH_MAX else None
    while type(dataset) is Subset:
        dataset = dataset.dataset
    bottom = length_of(dataset)
    return None if way is None or way.parts != 1 or bottom is None else (bottom, way)


def _digest(way: Underlying, length: int) -> int:
    """Of a Subset's table."""
    crc = 0
    for first in range(0, length, 1 << 16):
        indices: Numbers = np.arange(first, min(first + (1 << 16), length), dtype=np.int64)
        crc = crc32(way.of_all(indices)[0].tobytes(), crc)
    return crc


def _contents(dataset: Any, length: int | None) -> dict[str, int]:
    """Digests of lists with an element for each sample, by their path: of some of the elements.

    One with elements that nobody knows, or that are not there yet, as in a cache, is left out.
    """
    orders = copy_state(dataset, length).orders
    known = [(path, each) for path, each in sorted(orders.items()) if all(each.sampled)]
    return {
        path: crc32(repr((each.length, each.sampled)).encode())
        for path, each in known[:_CONTENTS_MAX]
    }
