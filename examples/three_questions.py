"""Three things you can ask a SafeDataLoader. The documentation shows what this prints."""

import torch

from safeloader import SafeDataLoader, SafeLoaderError


class Scans:
    """A thousand images; one record may be corrupt."""

    def __init__(self, corrupt: int | None = None) -> None:
        self.images = torch.rand(1000, 1, 28, 28)
        self.corrupt = corrupt

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {"image": self.images[index], "label": torch.tensor(index % 10)}
        if index == self.corrupt:
            del sample["image"]
        return sample


def main() -> None:
    torch.manual_seed(0)
    loader = SafeDataLoader(Scans(), batch_size=16, shuffle=True, drop_last=True, num_workers=2)

    print("1. Which samples were in this batch?")
    for step, batch in enumerate(loader):
        loss = batch["image"].mean()
        if step == 3:  # say, the loss became NaN here
            record = loader.last_batch
            print(f"loss {loss:.2f} at step {step}, from worker {record.worker_id}, samples:")
            print(record.indices)
    print("index 137 was delivered in batch", loader.provenance.lookup(137)["batch"])

    print("\n2. Was everything delivered?")
    print(loader.audit)

    print("\n3. What broke, and where?")
    loader = SafeDataLoader(Scans(corrupt=137), batch_size=16, num_workers=2)
    try:
        for _ in loader:
            pass
    except SafeLoaderError as error:
        print(type(error).__name__, "at index", error.index)
        print(error)


if __name__ == "__main__":
    main()
