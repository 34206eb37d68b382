"""Ray Train with two workers; the first writes what each of them got, and the driver says it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from common import WAY, WORKERS, DataLoader, Points, Seen, model_of, prepared, recorded
from torch import distributed


def train(config: dict[str, Any]) -> None:
    seen = Seen()
    torch.manual_seed(7)
    model = ray.train.torch.prepare_model(model_of())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(Points(), batch_size=4, shuffle=True, num_workers=WORKERS)
    loader = prepared(ray.train.torch.prepare_data_loader(loader))
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        for batch in loader:  # records DataLoader
            x, y = batch
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
            loss.backward()
            optimizer.step()
            seen(f"train {epoch}", batch, loss)
    noted = recorded(loader) if WAY != "stock" else 0
    everyones: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyones, (seen.rows, seen.counted, noted))
    if distributed.get_rank() == 0:
        Path(config["told"]).write_text(json.dumps(everyones))


def main() -> None:
    told = Path("told.json").absolute()
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"told": str(told)},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(storage_path=os.getcwd()),
    )
    trainer.fit()
    for rank, (rows, counted, noted) in enumerate(json.loads(told.read_text())):
        print(*(f"{rank}: {row}" for row in rows), f"counted {counted}", sep="\n")
        print(f"recorded {noted}", file=sys.stderr)
    ray.shutdown()


if __name__ == "__main__":
    main()
