"""The metrics of a training's loader in Lightning's loggers. Runs in: main."""

from __future__ import annotations

import sys
from typing import Any

from safeloader.integrations.logged import LoggedLoaders

# The package has two names, whose classes are not each other's: that of the user's trainer.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    from lightning.pytorch import Callback


class LightningCallback(Callback):
    """Logs :meth:`loader.metrics() <safeloader.records.Records.metrics>` of the training's loader.

    Every ``log_every_n_steps`` of the trainer those of the batches since then, within the epoch
    that runs, as ``data/wait_share`` and so on; at the end of an epoch those of all of it, as
    ``data_epoch/wait_share``. They go to every logger of the trainer, TensorBoard or another.

    Args:
        prefix: the word before the name of each metric.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from safeloader.integrations import LightningCallback
        >>> trainer = Trainer(
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     callbacks=[LightningCallback()],
        ... )
    """

    def __init__(self, prefix: str = "data") -> None:
        self._logged = LoggedLoaders(prefix)
        self._step = 0  # that was logged last

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where Lightning logs its own."""
        every, step = trainer.log_every_n_steps, trainer.global_step
        # Of the training and not of its epoch, which may be shorter; several batches may be a step.
        if every and step % every == 0 and step != self._step:
            self._step = step
            _log(trainer, self._logged.since_last(trainer.train_dataloader))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch."""
        _log(trainer, self._logged.of_epoch(trainer.train_dataloader))


def _log(trainer: Any, metrics: dict[str, float]) -> None:
    step = max(0, trainer.global_step - 1)  # where Lightning puts the loss of that batch
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(metrics, step=step)
