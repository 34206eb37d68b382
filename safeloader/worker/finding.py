"""Which index of a batch ``__getitems__`` cannot fetch. Runs in: worker.

Asking again runs the user's code again, so the random-number generators are put back afterwards:
the batches that follow are what they would have been.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from safeloader.introspect.random_state import preserved
from safeloader.introspect.texts import index_text

_BOUND_S = 10.0


def find_single(dataset: Any, indices: list[Any], raised: Exception) -> tuple[int | None, str]:
    """Position of the first index that fails alone, and a sentence on how it was found.

    The samples are asked for one at a time, for ten seconds at most.
    """
    if len(indices) == 1:
        return 0, ""
    give_up = monotonic() + _BOUND_S
    with preserved():
        for position, index in enumerate(indices):
            if monotonic() > give_up:
                return None, (
                    f"__getitems__ raised; asking for the {len(indices)} samples one at a time, "
                    f"the first {position} came without error in {_BOUND_S:.0f} s"
                )
            try:
                dataset.__getitems__([index])
            except type(raised):
                return position, (
                    f"__getitems__ raised for the whole batch; index {index_text(index)} was "
                    f"found by asking for the {len(indices)} samples one at a time"
                )
            except KeyboardInterrupt:
                raise
            except BaseException:  # another fault of the same call: not the one to explain
                continue
    return None, (
        f"__getitems__ raised for the whole batch, but for none of the {len(indices)} indices "
        "asked for one at a time: look at what they have in common"
    )
