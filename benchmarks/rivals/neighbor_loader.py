"""PyG's NeighborLoader on a graph of ours. Runs in an environment of its own, because torch-sparse comes as source:

    python -m venv rival && rival/bin/pip install torch torch-geometric numpy setuptools wheel ninja
    rival/bin/pip install --no-build-isolation torch-scatter torch-sparse     # compiles for some ten minutes
    rival/bin/python benchmarks/rivals/neighbor_loader.py GRAPH_FOLDER

Prints sampled edges per second as JSON: all that a loader gives (features aside), and its sampling function alone.
"""

import json
import sys
import time

import numpy as np
import torch
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.sampler import NeighborSampler, NodeSamplerInput

FANOUT, SEEDS, SECONDS = [10, 10], 1024, 5.0


def main() -> None:
    torch.set_num_threads(1)
    folder = sys.argv[1]
    offsets, neighbors = (np.load(f"{folder}/{name}.npy") for name in ("offsets", "neighbors"))
    num_nodes = len(offsets) - 1
    targets = torch.from_numpy(np.repeat(np.arange(num_nodes), np.diff(offsets)))
    data = Data(edge_index=torch.stack([torch.from_numpy(neighbors).long(), targets]), num_nodes=num_nodes)
    rates = {}

    torch.manual_seed(0)
    sampler = NeighborSampler(data, FANOUT)
    edges, rounds, started = 0, 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - started < SECONDS:
        if rounds == 3:  # warm now
            edges, started = 0, time.perf_counter()
        seeds = torch.randint(num_nodes, (SEEDS,)).unique()
        edges += sampler.sample_from_nodes(NodeSamplerInput(None, seeds)).row.numel()
        rounds += 1
    rates["sampler"] = edges / (time.perf_counter() - started)

    loader = NeighborLoader(data, FANOUT, input_nodes=torch.randperm(num_nodes), batch_size=SEEDS)
    edges, started = 0, 0.0
    for number, batch in enumerate(loader):
        if number == 3:
            edges, started = 0, time.perf_counter()
        edges += batch.edge_index.shape[1]
        if number >= 3 and time.perf_counter() - started > SECONDS:
            break
    rates["NeighborLoader"] = edges / (time.perf_counter() - started)
    print(json.dumps(rates))


main()
