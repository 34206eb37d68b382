"""PyG: its DataLoader of graphs, and its NodeLoader with a sampler that needs no other library."""

from __future__ import annotations

from typing import Any

import torch
from common import WORKERS, Seen, prepared
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader, NodeLoader
from torch_geometric.nn import GCNConv, global_mean_pool
from torch_geometric.sampler import BaseSampler, SamplerOutput
from torch_geometric.utils import subgraph


def graph(number: int, nodes: int = 5) -> Data:
    generator = torch.Generator().manual_seed(number)
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
    x = torch.randn(nodes, 4, generator=generator)
    return Data(x=x, edge_index=edges, y=x.sum().view(1))


class Neighbours(BaseSampler):
    """The seeds, some of their neighbours by chance, and all edges between these."""

    def __init__(self, data: Data) -> None:
        self.edges = data.edge_index

    def sample_from_nodes(self, index: Any, **kwargs: Any) -> SamplerOutput:
        seeds = index.node
        near = self.edges[0][
            torch.isin(self.edges[1], seeds) & (torch.rand(self.edges.shape[1]) < 0.5)
        ]
        others = near[~torch.isin(near, seeds)].unique()
        node = torch.cat([seeds, others])
        edges, kept = subgraph(
            node, self.edges, torch.arange(self.edges.shape[1]), relabel_nodes=False
        )
        place = torch.full((int(self.edges.max()) + 1,), -1)
        place[node] = torch.arange(len(node))
        return SamplerOutput(
            node,
            place[edges[0]],
            place[edges[1]],
            kept,
            num_sampled_nodes=[len(seeds), len(others)],
            num_sampled_edges=[len(kept)],
            metadata=(index.input_id, index.time),
        )

    def sample_from_edges(self, index: Any, neg_sampling: Any = None) -> SamplerOutput:
        raise NotImplementedError


def main() -> None:
    seen = Seen()
    torch.manual_seed(7)
    first, last = GCNConv(4, 8), torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.05)

    def step(
        what: str, data: Any, out: torch.Tensor, y: torch.Tensor, samples: torch.Tensor
    ) -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(out[:, 0], y)
        loss.backward()
        optimizer.step()
        seen(what, [samples, data.x, data.edge_index], loss)

    graphs = prepared(
        DataLoader([graph(k) for k in range(11)], 4, shuffle=True, num_workers=WORKERS)
    )
    for epoch in range(2):
        for data in graphs:  # records DataLoader
            hidden = global_mean_pool(first(data.x, data.edge_index).tanh(), data.batch)
            step(f"graphs {epoch}", data, last(hidden), data.y, data.y)

    large = graph(100, nodes=23)
    large.y = large.x.sum(1)
    nodes = prepared(
        NodeLoader(large, Neighbours(large), batch_size=4, shuffle=True, num_workers=WORKERS)
    )
    for epoch in range(2):
        for data in nodes:  # records NodeLoader
            out = last(first(data.x, data.edge_index).tanh())[: data.batch_size]
            step(f"nodes {epoch}", data, out, data.y[: data.batch_size], data.input_id)
    seen.end(graphs, nodes)


if __name__ == "__main__":
    main()
