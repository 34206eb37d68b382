"""DistributedDataParallel in the processes that torchrun starts."""

from __future__ import annotations

import torch
from common import WORKERS, DataLoader, Points, Seen, model_of
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def main() -> None:
    distributed.init_process_group("gloo")
    seen = Seen()
    torch.manual_seed(7)
    model = DistributedDataParallel(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sampler: DistributedSampler[int] = DistributedSampler(Points(), seed=5)
    loader = DataLoader(Points(), batch_size=4, sampler=sampler, num_workers=WORKERS)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:  # records DataLoader
            x, y = batch
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
            loss.backward()
            optimizer.step()
            seen(f"train {epoch}", batch, loss)
    seen.end_of_all(loader)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
