"""A loader in Transformers' ``Trainer``: metrics, and the batches of each step. Runs in: main."""

from __future__ import annotations

import os
import weakref
from typing import Any

from transformers import TrainerCallback

from safeloader.instrumenting import instrument, loaders_of
from safeloader.integrations.logged import LoggedLoaders
from safeloader.integrations.steps import MarkedSteps


class TransformersCallback(TrainerCallback):
    """Records the loader that the ``Trainer`` made, and logs its metrics.

    The ``Trainer`` makes its loader itself, or makes yours again as torch's own class; this gives
    it to :func:`safeloader.instrument` when training begins, unless it is recorded already. With
    each log of the trainer (``logging_steps``) come the
    :meth:`metrics <safeloader.records.Records.metrics>` of the batches since the last one, as
    ``data/wait_share`` and so on; at the end of an epoch those of all of it, as
    ``data_epoch/wait_share``. They go the way of every log: ``state.log_history``, and what
    ``report_to`` names.

    Where a run is written (``run_dir=``, ``SAFELOADER_RUN``), the batches of each step are marked
    in it, all of them where gradients are accumulated: ``python -m safeloader step RUN 17`` names
    the samples of the step that the logs call 17. In the epoch that a checkpoint goes on in, the
    ``Trainer`` reads from a loader that nobody else sees, and no step is marked.

    Args:
        trainer: the trainer, whose ``log`` is called. It is not held.
        prefix: the word before the name of each metric.
        options: keywords of :class:`~safeloader.SafeDataLoader` for the loader.

    Raises:
        TypeError: from ``Trainer.train``, for a loader that cannot be recorded or an option that
            is not one of ours.

    Example:
        ::

            trainer = Trainer(model, arguments, train_dataset=dataset)
            trainer.add_callback(TransformersCallback(trainer, verify="warn"))
            trainer.train()
    """

    def __init__(self, trainer: Any, prefix: str = "data", **options: Any) -> None:
        self._trainer = weakref.ref(trainer)
        self._options = options
        self._logged = LoggedLoaders(prefix)
        self._ours = False  # the log that is being written
        self._marked = MarkedSteps()
        self._trained = 0  # batches of this epoch

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Have the loader recorded; in a launched program it is, with the options given there."""
        if train_dataloader is None or os.environ.get("SAFELOADER_LAUNCHED"):
            return
        if not loaders_of(train_dataloader):
            instrument(train_dataloader, **self._options)

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Count the batches of the epoch from here on."""
        self._trained = 0
        self._marked.epoch_begins(train_dataloader, asked=False)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Mark the first batch of a step before it is trained on."""
        self._marked.trains_on(train_dataloader, state.global_step + 1, self._trained)

    def on_substep_end(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Mark the next batch of the same step: of these all were fetched."""
        self._trained += 1
        self._marked.trains_on(train_dataloader, state.global_step + 1, self._trained)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the last batch of a step."""
        self._trained += 1

    def on_log(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Log ours after the trainer's."""
        if not self._ours and train_dataloader is not None:
            self._log(self._logged.since_last(train_dataloader))

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Log the epoch."""
        if train_dataloader is not None:
            self._log(self._logged.of_epoch(train_dataloader))

    def _log(self, metrics: dict[str, float]) -> None:
        trainer = self._trainer()
        if not metrics or trainer is None:
            return
        self._ours = True
        try:
            trainer.log(metrics)
        finally:
            self._ours = False
