"""A training's loader in Lightning: its metrics, and the batches of each step. Runs in: main."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from safeloader.integrations.logged import LoggedLoaders
from safeloader.integrations.steps import MarkedSteps

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

    Where a run is written (``run_dir=``, ``SAFELOADER_RUN``), the batches of each step are marked
    in it, all of them where gradients are accumulated: ``python -m safeloader step RUN 17`` names
    the samples of the step that loggers call 17, ``trainer.global_step`` as it begins. That needs
    one loader, and a ``training_step`` that is given its batch.

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
        self._marked = MarkedSteps()
        self._first: int | None = None  # Lightning's number of the first batch in this epoch
        self._asks = False  # a ``training_step`` that takes batches by itself, as many as it likes
        self._began = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the batches of the epoch from here on."""
        self._first = None
        self._asks = "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
        self._marked.epoch_begins(trainer.train_dataloader, asked=True)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the batch before it is trained on: the step may be the last one."""
        if self._first is None:
            self._first = batch_idx  # not 0 where a checkpoint in mid-epoch goes on
        self._began = trainer.global_step
        self._mark(trainer, self._began, batch_idx)

    def _mark(self, trainer: Any, step: int, batch_idx: int) -> None:
        if not self._asks:
            number = batch_idx - (self._first or 0)
            self._marked.trains_on(trainer.train_dataloader, step, number)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where Lightning logs its own."""
        for further in range(self._began + 1, trainer.global_step):  # of several optimizers
            self._mark(trainer, further, batch_idx)
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
