"""What type checkers have to refuse: each line that says so, and no other."""

from __future__ import annotations

from torch.utils.data import Dataset

from safeloader import GlobalBatchSampler, SafeDataLoader


class Samples(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


SafeDataLoader(Samples(), batch_sise=3)  # refused
SafeDataLoader(Samples(), on_error="skpi")  # refused
SafeDataLoader(Samples(), verify="loud")  # refused
SafeDataLoader(Samples(), verify=True)  # refused
SafeDataLoader(Samples(), on_crash="skip")  # refused
SafeDataLoader(Samples(), transport="tcp")  # refused
SafeDataLoader(Samples(), retries="3")  # refused
SafeDataLoader(Samples(), num_workers="2")  # refused
SafeDataLoader(Samples(), key="id")  # refused
SafeDataLoader(Samples(), recorder=3)  # refused
SafeDataLoader(Samples(), seed="3")  # refused
SafeDataLoader(Samples(), seed_per="epoch")  # refused
SafeDataLoader()  # refused
GlobalBatchSampler(3, 2, tail="keep")  # refused
loader = SafeDataLoader(Samples(), batch_size=3)
wrong: SafeDataLoader[str] = loader  # refused
print(loader.last_batch.indicies)  # refused
print(loader.audit.okay)  # refused
loader.no_such_attribute  # refused
