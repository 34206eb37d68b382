"""Train a small network on real scanned digits, with SafeDataLoader in place of DataLoader.

::

    pip install -e '.[examples]'           # scikit-learn, which brings the digits, and tqdm
    python examples/train_digits.py        # train, then show what was recorded
    python examples/train_digits.py --break-at 137 --break-how none    # meet a broken sample

With ``--break-how stop`` torch's own loader (``SAFELOADER=off`` before the command) ends each epoch
at the broken sample without a word, and trains on what came before it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # ships no type hints
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # as above
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type hints

from safeloader import SafeDataLoader, SafeLoaderError

Sample = tuple[Tensor, Tensor]  # image, float32 (1, 8, 8); label, int64 ()


# ── the data ─────────────────────────────────────────────────────────────────────────────────────


class Digits(Dataset[Sample]):
    """Images of 8 x 8 pixels with values from 0 to 1, and their labels."""

    def __init__(self, images: Tensor, labels: Tensor, augmented: bool) -> None:
        self.images = images
        self.labels = labels
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        return augment(image) if self.augmented else image, self.labels[index]


def augment(image: Tensor) -> Tensor:
    """The image a little turned, scaled, shifted and noisy, at random."""
    turn, size, right, down = torch.empty(4).uniform_(-1, 1).tolist()
    angle, scale = turn * math.radians(12), 1 + 0.1 * size
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    # A shift of 1 is half the image: 0.2 is at most four fifths of a pixel.
    matrix = torch.tensor([[[cos, -sin, 0.2 * right], [sin, cos, 0.2 * down]]])
    grid = F.affine_grid(matrix, [1, *image.shape], align_corners=False)
    moved = F.grid_sample(image[None], grid, align_corners=False)[0]
    return moved + 0.05 * torch.randn_like(moved)


class BrokenDigits(Digits):
    """The digits with one bad sample, as real data sets have them; for ``--break-at``."""

    def __init__(self, digits: Digits, bad_index: int, how: str) -> None:
        super().__init__(digits.images, digits.labels, digits.augmented)
        self.bad_index = bad_index
        self.how = how

    def __getitem__(self, index: int) -> Sample:
        image, label = super().__getitem__(index)
        if index == self.bad_index:
            if self.how == "raise":  # a record that lacks a field
                record: dict[str, Tensor] = {"label": label}
                image = record["pixels"]
            elif self.how == "none":  # a path through the code without a return value
                return None  # type: ignore[return-value]  # the mistake to be shown
            elif self.how == "ragged":  # an image that was cropped differently
                image = image[:, :, 1:]
            elif self.how == "stop":  # a search that finds nothing
                label = next(other for other in self.labels if other > 9)
        return image, label


def load_split(seed: int) -> tuple[Digits, Digits]:
    """Four fifths of the digits to train on and one to test with, each with all ten digits."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed
    )
    targets = torch.from_numpy(labels)
    return (
        Digits(images[train], targets[train], augmented=True),
        Digits(images[test], targets[test], augmented=False),
    )


# ── the training ─────────────────────────────────────────────────────────────────────────────────


def make_model() -> nn.Module:
    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64 * 2 * 2, 10),
    )


def train_epoch(
    model: nn.Module,
    loader: SafeDataLoader[Sample],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    title: str,
) -> float:
    """One pass over the training set; the mean loss of its batches."""
    model.train()
    losses = []
    # disable=None: a bar on a terminal, none in a log file.
    with tqdm(loader, desc=title, unit="batch", leave=False, disable=None) as bar:
        for images, labels in bar:
            loss = F.cross_entropy(model(images), labels)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()}; {samples_at_hand(loader)}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no hints for it
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses) / len(losses)


def samples_at_hand(loader: SafeDataLoader[Sample]) -> str:
    """Which samples the training loop is looking at: the first thing to ask about a NaN."""
    batch = loader.last_batch
    if batch is None:
        return "which samples gave it was not recorded"
    indices = ", ".join(str(index) for index in batch.indices)
    return f"epoch {batch.epoch}, batch {batch.batch}: training samples {indices}"


@torch.inference_mode()
def accuracy(model: nn.Module, loader: SafeDataLoader[Sample]) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]  # torch: not all have a length


def train(
    train_loader: SafeDataLoader[Sample], test_loader: SafeDataLoader[Sample], epochs: int
) -> float:
    """Train a new model; its accuracy on the test set."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train_loader))
    # Before the first epoch, so that trouble with the test set shows now and not after it.
    test_accuracy = accuracy(model, test_loader)
    print(f"untrained: test accuracy {test_accuracy:.2%}", flush=True)
    for epoch in range(epochs):
        title = f"epoch {epoch:2}"
        loss = train_epoch(model, train_loader, optimizer, schedule, title)
        test_accuracy = accuracy(model, test_loader)
        print(f"{title}: loss {loss:.3f}, test accuracy {test_accuracy:.2%}", flush=True)
    return test_accuracy


# ── what the loader knows ────────────────────────────────────────────────────────────────────────


def show_slowest(loader: SafeDataLoader[Sample], labels: Tensor, count: int = 5) -> None:
    """The samples that took longest: where to look when the data cannot keep up.

    A lone slow one is the machine's doing (a start, a busy core), one index again and again is not.
    """
    rows = loader.provenance.to_numpy()  # one row for each sample delivered
    batches = len(np.unique(rows[["epoch", "batch"]]))
    print(f"\nRecorded: {len(rows)} samples in {batches} batches.")
    if not len(rows):
        return
    print(f"Slowest of them (the median took {np.median(rows['fetch_ns']) / 1e6:.2f} ms):")
    print("  index  label  worker      ms  epoch  batch")
    for row in rows[np.argsort(rows["fetch_ns"])[::-1][:count]]:
        worker = "main" if row["worker_id"] < 0 else row["worker_id"]
        print(
            f"{row['index']:7}{labels[row['index']]:7}{worker:>8}{row['fetch_ns'] / 1e6:8.2f}"
            f"{row['epoch']:7}{row['batch']:7}"
        )


def show_failure(error: SafeLoaderError, loader: SafeDataLoader[Sample]) -> None:
    """What the user sees, what a program can ask for, and how far the epoch came."""
    print(f"\n── str(error) {'─' * 66}\n{error}")
    print(f"\n── error.failure {'─' * 63}")
    failure = error.failure
    if failure is not None:
        print(f"{'type':14}{type(error).__name__}")
        for name in ("phase", "index", "position", "batch", "worker_id"):
            print(f"{name:14}{getattr(failure, name)}")
        print(f"{'dataset_state':14}{', '.join(failure.dataset_state or {})}")
    print(f"\n── loader.audit {'─' * 64}\n{loader.audit}\n")


# ── the command line ─────────────────────────────────────────────────────────────────────────────


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train on scanned digits with SafeDataLoader.")
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--break-at", type=int, metavar="N", help="make training sample N fail")
    parser.add_argument(
        "--break-how",
        choices=("raise", "none", "ragged", "stop"),
        help="the sample raises a KeyError (default), is None, has another shape than the others, "
        "or lets a StopIteration out",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name, low in (("epochs", 1), ("workers", 0), ("batch-size", 1), ("seed", 0)):
        value = getattr(options, name.replace("-", "_"))
        if not low <= value < 2**32:
            parser.error(f"argument --{name}: must be from {low} to {2**32 - 1}, not {value}")
    if options.break_how is not None and options.break_at is None:
        parser.error("argument --break-how: needs --break-at N, the sample that is to fail")

    torch.set_num_threads(1)  # the network is small: threads would wait more than they compute
    torch.manual_seed(options.seed)
    train_set, test_set = load_split(options.seed)
    if options.break_at is not None:
        if not 0 <= options.break_at < len(train_set):
            parser.error(
                f"argument --break-at: there is no training sample {options.break_at}; "
                f"they are numbered 0 to {len(train_set) - 1}"
            )
        train_set = BrokenDigits(train_set, options.break_at, options.break_how or "raise")

    train_loader = SafeDataLoader(
        train_set,
        batch_size=options.batch_size,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    test_loader = SafeDataLoader(
        test_set,
        batch_size=256,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    print(
        f"{len(train_set)} digits to train on, {len(test_set)} to test with; "
        f"batch size {options.batch_size}, workers {options.workers}, seed {options.seed}"
    )

    start = time.perf_counter()
    try:
        test_accuracy = train(train_loader, test_loader, options.epochs)
    except SafeLoaderError as error:
        if options.break_at is None:
            raise
        show_failure(error, train_loader)
        in_process = "; --workers 0 fails in this process, where a debugger can step in"
        print(
            f"Try next: mend training sample {options.break_at} (here: leave --break-at out)"
            f"{in_process if options.workers else ''}."
        )
        return 1
    print(f"\nTest accuracy {test_accuracy:.2%} after {time.perf_counter() - start:.1f} s.")
    print(f"\nAudit of the last epoch of training:\n{train_loader.audit}")
    show_slowest(train_loader, train_set.labels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
