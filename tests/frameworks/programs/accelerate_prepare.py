"""Accelerate: it makes the loader again, in a wrapper of its own, also to go on in mid-epoch.

As ``accelerate launch --cpu --num_processes 2`` runs it, each process has its share.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from common import WORKERS, DataLoader, Points, Seen, model_of, prepared
from torch import distributed


def main() -> None:
    seen = Seen()
    accelerator = Accelerator(cpu=True)
    set_seed(7)
    model = model_of()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))

    def step(what: str, batch: Any) -> None:
        x, y = batch
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
        accelerator.backward(loss)
        optimizer.step()
        seen(what, batch, loss)

    loader = DataLoader(Points(24), batch_size=4, shuffle=True, num_workers=WORKERS)
    shard = prepared(accelerator.prepare(loader))
    for epoch in range(2):
        for batch in shard:  # records DataLoader
            step(f"train {epoch}", batch)
    rest = prepared(accelerator.skip_first_batches(shard, num_batches=1))
    for batch in rest:  # records DataLoader
        step("went on", batch)

    accelerator.dataloader_config = DataLoaderConfiguration(dispatch_batches=True)
    loader = DataLoader(Points(16), batch_size=4, shuffle=True, num_workers=WORKERS)
    dispatched = prepared(accelerator.prepare(loader))
    for batch in dispatched:  # records DataLoader
        step("dispatched", batch)

    if distributed.is_initialized():
        seen.end_of_all(shard, rest, dispatched)
    else:
        seen.end(shard, rest, dispatched)
    accelerator.end_training()


if __name__ == "__main__":
    main()
