"""torchdata's StatefulDataLoader, which makes its own iterators, beside a plain loader."""

from __future__ import annotations

import torch
from common import WORKERS, Points, Seen, model_of
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader


def main() -> None:
    seen, plain = Seen(), Seen()
    torch.manual_seed(7)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = StatefulDataLoader(Points(), batch_size=4, shuffle=True, num_workers=WORKERS)
    state = None
    for epoch in range(2):
        for step, batch in enumerate(loader):  # NOT recorded: StatefulDataLoader
            x, y = batch
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x)[:, 0], y)
            loss.backward()
            optimizer.step()
            seen(f"train {epoch}", batch, loss)
            if (epoch, step) == (1, 2):
                state = loader.state_dict()
    loader.load_state_dict(state)
    for batch in loader:  # NOT recorded: StatefulDataLoader
        seen("went on", batch)
    for batch in DataLoader(Points(9), batch_size=4, num_workers=WORKERS):  # records DataLoader
        plain("val", batch)
    print(*seen.rows, f"got {seen.counted}", sep="\n")
    plain.end()


if __name__ == "__main__":
    main()
