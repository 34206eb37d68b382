"""A demonstration: real digits, two faults in them, and what each loader makes of it.

::

    make demo        # or: pip install -e '.[examples,run,report,cli]' && python examples/demo.py

Image 137 has lost its pixels, and reading image 404 kills the process that reads it. First torch's
loader trains on these, then ours; in the end the network has learnt, and what happened is told.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type hints
from train_digits import Digits, Sample, accuracy, load_split, make_model

from safeloader import SafeDataLoader
from safeloader.__main__ import main as report

LOST = 137  # has no pixels
DEADLY = 404  # kills its reader, as a bug in a decoder may
EPOCHS = 6
RUN = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")  # what was recorded lies there


class FaultyDigits(Digits):
    """The digits, two of which are as real data sets have them."""

    def __init__(self, digits: Digits) -> None:
        super().__init__(digits.images, digits.labels, digits.augmented)
        self.files = [f"scans/{k:04d}.png" for k in range(len(digits))]

    def __getitem__(self, index: int) -> Sample:
        if index == LOST:
            record: dict[str, torch.Tensor] = {"label": self.labels[index]}
            return record["pixels"], record["label"]
        if index == DEADLY and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class FirstLines(logging.Handler):
    """Prints the log lines of the first epoch above the bar; each epoch has the same."""

    left = 5

    def emit(self, record: logging.LogRecord) -> None:
        if self.left:
            tqdm.write(f"  {record.getMessage()}")
            self.left -= 1
            if not self.left:
                tqdm.write("  (so in each epoch)")


def headline(text: str) -> None:
    print(f"\n── {text} {'─' * (88 - len(text))}", flush=True)


def train(loader: Any, epochs: int, title: str) -> torch.nn.Module:
    """Train a new network on what the loader gives."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    with tqdm(total=epochs * len(loader), desc=title, unit="batch", disable=None) as bar:
        for _ in range(epochs):
            model.train()
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no hints for it
                optimizer.step()
                bar.update()
    return model


def main() -> int:
    logging.getLogger("safeloader").addHandler(FirstLines(logging.WARNING))
    warnings.simplefilter("ignore")  # of other libraries
    torch.set_num_threads(1)  # the network is small: threads would wait more than they compute
    torch.manual_seed(0)
    digits, test_set = load_split(seed=0)
    faulty = FaultyDigits(digits)
    RUN.parent.mkdir(exist_ok=True)
    print(
        f"{len(faulty)} scanned digits to train on. One has lost its pixels, and one kills the "
        "process that reads it."
    )

    headline("torch.utils.data.DataLoader")
    arguments: dict[str, Any] = {"batch_size": 64, "num_workers": 2, "shuffle": True}
    try:
        train(DataLoader(faulty, **arguments), 1, "training")
    except Exception as error:
        lines = str(error).splitlines()
        print(f"\n{type(error).__name__}: {lines[0]}")
        if len(lines) > 1:
            print("  ...", lines[-1], sep="\n")
        print("Training has ended: at which image? And the other fault is still to come.")

    headline("safeloader.SafeDataLoader, the same arguments, and on_error=, on_crash=")
    began = time.perf_counter()
    safe: dict[str, Any] = {"on_error": "skip", "on_crash": "restart", "run_dir": RUN}
    loader = SafeDataLoader(faulty, **arguments, **safe)
    model = train(loader, EPOCHS, "training")
    seconds = time.perf_counter() - began
    correct = accuracy(model, SafeDataLoader(test_set, batch_size=256, run_dir=False))

    headline("What came of it")
    print(f"{EPOCHS} epochs in {seconds:.0f} s; {correct:.1%} of the test digits are read right.")
    print(f"\nloader.audit, of the last epoch:\n{loader.audit}\n")
    page = RUN / "report.html"
    report(["report", str(RUN), "-o", str(page)])
    print(f"open {page} in a browser: what happened, as a page")
    print(f"or ask the run: python -m safeloader index {RUN} {LOST}")
    return 0 if correct > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
