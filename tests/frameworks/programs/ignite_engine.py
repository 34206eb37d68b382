"""Ignite: two engines, and the deterministic one, which makes the loader again."""

from __future__ import annotations

from typing import Any

import torch
from common import WORKERS, DataLoader, Points, Seen, model_of, prepared
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.engine.deterministic import DeterministicEngine
from ignite.metrics import MeanSquaredError


def main() -> None:
    seen = Seen()
    torch.manual_seed(7)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(engine: Engine, batch: Any) -> float:
        x, y = batch
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
        loss.backward()
        optimizer.step()
        seen(f"train {engine.state.epoch}", batch, loss)
        return loss.item()

    train = prepared(DataLoader(Points(), batch_size=4, shuffle=True, num_workers=WORKERS))
    val = prepared(DataLoader(Points(9), batch_size=4, num_workers=WORKERS))
    trainer = Engine(step)
    metrics = {"mse": MeanSquaredError(lambda output: (output[0][:, 0], output[1]))}
    evaluator = create_supervised_evaluator(model, metrics=metrics)

    @evaluator.on(Events.ITERATION_COMPLETED)
    def evaluated(engine: Engine) -> None:
        seen("val", engine.state.batch)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine: Engine) -> None:
        evaluator.run(val)  # records DataLoader
        seen.rows.append(f"metric {evaluator.state.metrics['mse']!r}")

    trainer.run(train, max_epochs=2)  # records DataLoader

    again = prepared(DataLoader(Points(), batch_size=4, shuffle=True, num_workers=WORKERS))
    DeterministicEngine(step).run(again, max_epochs=2)  # records DataLoader
    seen.end(train, val, again)


if __name__ == "__main__":
    main()
