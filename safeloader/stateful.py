"""``SafeStatefulDataLoader``: a loader that can be saved and gone on from. Runs in: main."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from safeloader.errors import ResumeError
from safeloader.failures.loader_log import LoaderLog
from safeloader.introspect.seeds import EpochSeed
from safeloader.loader import SafeDataLoader, why_unrecorded
from safeloader.main.continuity import Continuity
from safeloader.provenance.table import BatchRecord
from safeloader.settings import KEEPS_PLACE, Settings, is_off

T_co = TypeVar("T_co", covariant=True)


class SafeStatefulDataLoader(SafeDataLoader[T_co]):
    """A :class:`SafeDataLoader` whose place can be saved and gone on from, exactly.

    A drop-in for torchdata's ``StatefulDataLoader``: it takes the same arguments, and those of
    :class:`SafeDataLoader`. What was handed over before a state was taken does not come again, and
    the rest comes once: the indices drawn before are drawn again, without fetching them, and have
    to have the digest that stands in the state.

    Args:
        dataset: as for ``DataLoader``.
        args: further arguments of ``DataLoader``.
        snapshot_every_n_steps: of a dataset with a ``state_dict`` of its own, after how many
            batches of a worker its state is taken.
        kwargs: further keywords of :class:`SafeDataLoader`.

    Example:
        >>> import torch
        >>> from safeloader import SafeStatefulDataLoader
        >>> def make():
        ...     return SafeStatefulDataLoader(torch.arange(6), batch_size=2, shuffle=True)
        >>> loader = make()
        >>> batches = iter(loader)
        >>> first = next(batches)
        >>> state = loader.state_dict()
        >>> rest = [batch.tolist() for batch in batches]
        >>> other = make()
        >>> other.load_state_dict(state)
        >>> [batch.tolist() for batch in other] == rest
        True
        >>> print(other.audit)
        epoch 0: complete, ok; 6 drawn, 4 delivered
          resumed at batch 1; 2 delivered before
    """

    # At class level: some frameworks make loaders on which __init__ never runs.
    snapshot_every_n_steps = 1

    if not TYPE_CHECKING:

        def __init__(self, dataset, *args, snapshot_every_n_steps=1, **kwargs):
            super().__init__(dataset, *args, **kwargs)
            self.snapshot_every_n_steps = snapshot_every_n_steps

    def _place(self) -> Continuity:
        kept: Continuity | None = vars(self).get(KEEPS_PLACE)
        if kept is None:  # frameworks make loaders on which __init__ never ran
            kept = vars(self)[KEEPS_PLACE] = Continuity()
        return kept

    def state_dict(self, after: BatchRecord | None = None) -> dict[str, Any]:
        """Where the loader is: before the first batch, between two, or after the last.

        It holds plain values, which JSON and ``torch.save`` take. Nothing is drawn for it, no
        worker is started or waited for. After the last batch was handed over it says that nothing
        is left; once the loop has asked for another one, or ``set_epoch()`` was called, it is that
        of the next epoch.

        Args:
            after: the record of one of the newest 1024 batches of this epoch: the state as that
                was handed over. Frameworks take a batch ahead of the one they train on.

        Raises:
            ResumeError: if the state after that batch is not known, if its record is another
                loader's, or if nothing is recorded.
        """
        self._see_recorded()
        if after is not None:
            self._see_own(after)
        return self._place().state(self, after)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` with the next ``iter()``; ``{}`` begins anew.

        An iterator made before is at its end: asked for a batch it raises a ``ResumeError``.

        Raises:
            ResumeError: if this loader cannot go on from there, with what to do; then nothing is
                changed. Whether the sampler draws the same is seen by ``iter()``, which raises it
                then.
        """
        self._see_recorded()
        self._place().load(self, state)

    def _seed_of_next(self, settings: Settings) -> EpochSeed | None:
        self._next_epoch = self._place().next_epoch
        return super()._seed_of_next(settings)

    def _see_recorded(self) -> None:
        why = "SAFELOADER=off is set" if is_off() else why_unrecorded(self.num_workers > 0)
        if why:
            raise ResumeError(
                f"the place of this loader is not known, as torch's own iterator serves it: {why}"
            )

    def _see_own(self, after: BatchRecord) -> None:
        """See that a record is of this loader, as far as its own is not forgotten."""
        try:
            own = self.provenance.batch(after.batch, after.epoch)
        except (AttributeError, LookupError):
            return
        if (own.pid, own.start_ns, own.fetch_ns) != (after.pid, after.start_ns, after.fetch_ns):
            raise ResumeError(
                f"the record of batch {after.batch} that was given is another loader's, or of "
                "another run: give last_batch of the loader whose state it is"
            )

    def _count_from(self, epoch: Any) -> None:
        super()._count_from(epoch)
        self._place().set_epoch(self._next_epoch, LoaderLog(self.dataset, kind=type(self).__name__))

    def _get_iterator(self) -> Any:
        self._place()
        return super()._get_iterator()

    def __getstate__(self) -> dict[str, Any]:
        """The state without the place: a copy is at its beginning."""
        state = super().__getstate__()
        state.pop(KEEPS_PLACE, None)
        return state
