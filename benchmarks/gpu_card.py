"""The card, behind one object: every call of CUDA that `benchmarks.gpu` makes is in `Cuda`.

`Rehearsal` answers for it on a machine without one. Its copies stay under way until somebody waits
for them, as behind a busy stream: what goes wrong on a card with memory that is written to too
early goes wrong there as well.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every CUDA context of this process
SIDE = 8192  # of the matrices that keep a card busy
PRODUCTS = 100  # of them: about 150 ms on an H100


class Event(Protocol):
    """A point in the work of the card."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


class Card(Protocol):
    """What the parts ask of a card."""

    device: torch.device
    rehearsal: bool

    def facts(self) -> dict[str, Any]: ...
    def side_stream(self) -> torch.cuda.Stream | None: ...
    def event(self) -> Event: ...
    def synchronize(self) -> None: ...
    def empty(self, size: int) -> Tensor: ...
    def pinned(self, size: int) -> Tensor: ...
    def pin(self, tensor: Tensor) -> Tensor: ...
    def copy(self, target: Tensor, source: Tensor) -> None: ...
    def keep_busy(self) -> None: ...
    def register(self, tensor: Tensor) -> None: ...
    def unregister(self, tensor: Tensor) -> None: ...


class Cuda:
    """The card that is current."""

    rehearsal = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        } | _from_nvidia_smi()

    def side_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call, unused-ignore]

    def event(self) -> Event:
        event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty(self, size: int) -> Tensor:
        """Bytes on the card."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Tensor:
        """Bytes of page-locked memory, from torch's cache of it."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def pin(self, tensor: Tensor) -> Tensor:
        """What the pinning thread of a loader does with a tensor."""
        return tensor.pin_memory()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Put a copy into the current stream, and do not wait where the memory allows that."""
        target.copy_(source, non_blocking=True)

    def keep_busy(self) -> None:
        """Give the current stream so much to do that what comes next has to wait."""
        one = torch.ones(SIDE, SIDE, dtype=torch.bfloat16, device=self.device)
        other = torch.empty_like(one)
        for _ in range(PRODUCTS):
            torch.mm(one, one, out=other)

    def register(self, tensor: Tensor) -> None:
        """Page-lock memory that CUDA did not allocate.

        Raises:
            RuntimeError: where CUDA refuses.
        """
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call, unused-ignore]
        self._succeeded(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, PORTABLE))

    def unregister(self, tensor: Tensor) -> None:
        """Take that back; no copy may be under way."""
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call, unused-ignore]
        self._succeeded(cudart.cudaHostUnregister(tensor.data_ptr()))

    def _succeeded(self, code: Any) -> None:
        if int(code) == 0:
            return
        # CUDA keeps its last error, and torch's next kernel would raise it in another place.
        with suppress(RuntimeError):
            torch.ones(1, device=self.device)
        raise torch.cuda.CudaError(int(code))


def _from_nvidia_smi() -> dict[str, str]:
    """Driver and link of the first card; empty where the program is missing."""
    fields = "driver_version", "pcie.link.gen.max", "pcie.link.width.max"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        found = [each.strip() for each in said.stdout.strip().split(",")]
        return {name.replace(".", "_"): each for name, each in zip(fields, found, strict=False)}
    return {}


def slug(name: str) -> str:
    """A card's name for a file's: `NVIDIA H100 80GB HBM3` gives `nvidia-h100-80gb-hbm3`."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


# ------------------------------------------------------------------------------- no card at all


class _Point:
    """An event of the rehearsal: reached when nothing is under way that came before it."""

    def __init__(self, card: Rehearsal) -> None:
        self.card = card
        self.at_ns = 0
        self.before = 0

    def record(self) -> None:
        self.at_ns = time.perf_counter_ns()
        self.before = self.card.queued

    def query(self) -> bool:
        return self.card.done >= self.before

    def synchronize(self) -> None:
        self.card.work_until(self.before)

    def elapsed_time(self, end_event: _Point) -> float:
        return (end_event.at_ns - self.at_ns) / 1e6


class Rehearsal:
    """Does on the CPU what a card would do, and nothing faster."""

    rehearsal = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.queued = self.done = 0
        self._under_way: list[Callable[[], object]] = []
        self._busy = False

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none: a rehearsal on the CPU", "cuda": None}

    def side_stream(self) -> torch.cuda.Stream | None:
        return None

    def event(self) -> Event:
        return _Point(self)

    def synchronize(self) -> None:
        self.work_until(self.queued)
        self._busy = False

    def work_until(self, number: int) -> None:
        while self.done < number:
            self._under_way.pop(0)()
            self.done += 1

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    pinned = empty

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.queued += 1
        self._under_way.append(lambda: target.copy_(source))
        if not self._busy:
            self.work_until(self.queued)

    def keep_busy(self) -> None:
        self._busy = True

    def register(self, tensor: Tensor) -> None:
        if not tensor.nbytes:
            raise RuntimeError("nothing to register")

    def unregister(self, tensor: Tensor) -> None:
        if self.done < self.queued:
            raise RuntimeError("a copy is under way")
