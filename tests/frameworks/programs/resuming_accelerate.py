"""Accelerate, with the place of the loader in its checkpoints."""

from __future__ import annotations

import json

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from resuming import BATCH, EPOCHS, SEED, Noisy, Run, model_of

from safeloader import SafeStatefulDataLoader
from safeloader.integrations.accelerate import prepare


def main() -> None:
    run = Run()
    # On another number of processes the global batches are the same.
    config = DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    model = model_of()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    loader = SafeStatefulDataLoader(
        Noisy(), batch_size=BATCH, shuffle=True, num_workers=run.workers, seed=SEED
    )
    loader = prepare(accelerator, loader)

    step, at, checkpoint = 0, run.folder / "at.json", run.folder / "checkpoint"
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
        step = json.loads(at.read_text())
    for _ in range(step // len(loader), EPOCHS):
        for x, noise in loader:
            optimizer.zero_grad()
            accelerator.backward((model(x + noise) ** 2).mean())
            optimizer.step()
            run.trained(*accelerator.gather_for_metrics((x, noise)))
            step += 1
            assert loader.end_of_dataloader == (step % len(loader) == 0)
            if step == run.stop:
                accelerator.save_state(str(checkpoint))
                accelerator.wait_for_everyone()
                at.write_text(json.dumps(step))
                accelerator.wait_for_everyone()
                run.die()
    run.ended(accelerator.unwrap_model(model))
    accelerator.end_training()


if __name__ == "__main__":
    main()
