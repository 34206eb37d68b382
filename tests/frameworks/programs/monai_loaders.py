"""MONAI: its DataLoader, one that is read by a thread, and one whose workers are threads."""

from __future__ import annotations

from typing import Any

import torch
from common import WORKERS, Seen, model_of, prepared
from monai.data import DataLoader, Dataset, ThreadDataLoader
from monai.transforms import RandGaussianNoised, ToTensord


def points(length: int) -> list[dict[str, Any]]:
    rows = torch.randn(length, 4, generator=torch.Generator().manual_seed(3)).numpy()
    return [{"x": row, "y": row.sum()} for row in rows]


def main() -> None:
    seen, others = Seen(), Seen()
    torch.manual_seed(7)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(noted: Seen, what: str, batch: Any) -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])
        loss.backward()
        optimizer.step()
        noted(what, [batch["x"], batch["y"]], loss)

    noisy = RandGaussianNoised("x", prob=1.0)
    train = prepared(
        DataLoader(Dataset(points(23), noisy), batch_size=4, shuffle=True, num_workers=WORKERS)
    )
    for epoch in range(2):
        for batch in train:  # records DataLoader
            step(seen, f"train {epoch}", batch)
    quiet = Dataset(points(9), ToTensord("x"))
    ahead = prepared(ThreadDataLoader(quiet, batch_size=4, num_workers=WORKERS))
    for batch in ahead:  # records ThreadDataLoader
        step(seen, "by a thread", batch)
    threads = ThreadDataLoader(quiet, batch_size=4, num_workers=1, use_thread_workers=True)
    for batch in threads:  # NOT recorded: ThreadDataLoader
        step(others, "by worker threads", batch)
    print(*others.rows, f"got {others.counted}", sep="\n")
    seen.end(train, ahead)


if __name__ == "__main__":
    main()
