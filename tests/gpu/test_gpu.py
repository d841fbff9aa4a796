"""On a GPU, and in bf16 where that is what runs: the same answers as on the CPU, within the format's precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctd_scale.baselines.discrete import make_codes
from ctd_scale.baselines.train import make_task
from ctd_scale.config import GraphConfig, validate_config
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import new_denoiser
from ctd_scale.diffusion.sampler import at_once, common_noise, denoising_errors, error_probes, generate
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.encoder import LightGCN
from ctd_scale.graph.negatives import NegativeSampler
from ctd_scale.graph.sampler import NeighborSampler, make_minibatch
from ctd_scale.graph.table import EmbeddingTable
from ctd_scale.graph.train import minibatch_loss, train_steps
from ctd_scale.llm.inference import PreferenceModel

pytestmark = pytest.mark.gpu

CUDA, CPU = "cuda", "cpu"


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.cosine_similarity(left.float().cpu(), right.float().cpu(), dim=-1).min())


def test_the_encoder_and_its_gradients() -> None:
    random = np.random.default_rng(0)
    users, items = random.integers(0, 50, 400), random.integers(0, 40, 400)
    graph = BipartiteGraph.from_edges(users, items, 50, 40)
    batch = make_minibatch(
        NeighborSampler(graph, (4, 3)),
        NegativeSampler(graph, GraphConfig()),
        seed=0,
        step=0,
        batch_size=64,
        rank=0,
        world_size=1,
    )
    layer0 = random.normal(scale=0.1, size=(graph.num_nodes, 16)).astype(np.float32)
    losses, gradients = [], []
    for device in (CPU, CUDA):
        rows = torch.from_numpy(layer0[batch.nodes]).to(device).requires_grad_()
        loss = minibatch_loss(LightGCN().to(device), rows, rows[: batch.num_seeds], batch, 1e-4)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, [rows])[0].cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.allclose(gradients[1], gradients[0], atol=1e-5)


def test_training_steps_on_the_graph() -> None:
    random = np.random.default_rng(0)
    graph = BipartiteGraph.from_edges(random.integers(0, 50, 400), random.integers(0, 40, 400), 50, 40)
    sampler, negative_sampler = NeighborSampler(graph, (4, 3)), NegativeSampler(graph, GraphConfig())
    batches = [
        make_minibatch(sampler, negative_sampler, seed=0, step=step, batch_size=64, rank=0, world_size=1)
        for step in range(5)
    ]
    tables = [EmbeddingTable(graph.num_nodes, 16, 0.01, torch.device(device), seed=0) for device in (CPU, CUDA)]
    losses = [[float(loss) for loss in train_steps(batches, table, 1e-4)] for table in tables]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch.allclose(tables[1].weight.cpu(), tables[0].weight, atol=1e-4)


@pytest.mark.parametrize(("sampler", "items"), [("ddim", 0), ("dpmsolver++", 0), ("ddim", 3), ("distilled", 3)])
def test_the_denoiser_generates_and_judges(sampler: Any, items: int) -> None:
    config = DiffusionConfig(sampler=sampler, hidden_dim=32, guidance=1.5, condition_items=items)
    torch.manual_seed(0)
    model = new_denoiser(16, config).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.modulate.weight, std=0.1)
    for attention in model.attend if items else []:
        torch.nn.init.normal_(attention.leave.weight, std=0.1)
    conditions, candidates = torch.randn(5, 16), torch.randn(5, 7, 16)
    latest = torch.randn(5, items, 16) if items else None
    noise, probes = common_noise(4, 16, seed=0), error_probes(config, 16, seed=0)
    drawn, errors = [], []
    draw = at_once if sampler == "distilled" else generate
    for device in (CPU, CUDA):
        model.to(device)
        heard = None if latest is None else latest.to(device)
        drawn.append(draw(model, conditions.to(device), noise, config, heard))
        errors.append(denoising_errors(model, conditions.to(device), candidates.to(device), *probes, config, heard))
    assert drawn[1].device.type == errors[1].device.type == CUDA
    assert torch.allclose(drawn[1].cpu(), drawn[0], atol=1e-3)
    assert torch.allclose(errors[1].cpu(), errors[0], atol=1e-3)
    inputs = (torch.randn(5, 16, device=CUDA), torch.arange(5, device=CUDA), conditions.to(CUDA), None, heard)
    with torch.no_grad(), torch.autocast(CUDA, torch.bfloat16):
        half = model(*inputs)
    with torch.no_grad():
        assert cosine(half, model(*inputs)) > 0.99


@pytest.mark.parametrize(("dtype", "closeness"), [("float32", 0.9999), ("bfloat16", 0.98)])
def test_the_language_model_reads_and_speaks(tiny_chain: Any, dtype: str, closeness: float) -> None:
    histories = [np.array([3, 17, 4, 4, 9]), np.array([5]), np.array([0, 1])]
    folder: Path = tiny_chain.folder
    config = tiny_chain.config.model_copy(update={"dtype": dtype})
    made = [
        PreferenceModel(folder, tiny_chain.tokens, tiny_chain.log.catalogue, settings, torch.device(device))
        for device, settings in ((CPU, tiny_chain.config), (CUDA, config))
    ]
    expected, got = (torch.from_numpy(model(histories)) for model in made)
    assert got.isfinite().all()
    assert cosine(got, expected) > closeness
    texts = made[1].texts(histories)
    assert len(texts) == 3
    if dtype == "float32":
        assert texts == made[0].texts(histories)


@pytest.mark.parametrize("name", ["bpr_mf", "sasrec", "bsarec", "tiger"])
def test_baselines_lose_and_score_as_on_the_cpu(name: str, tiny_chain: Any, backbone: Path, tmp_path: Path) -> None:
    llm = {"backbone": str(backbone), "num_hidden_layers": 2, "max_history": 5, "dtype": "float32"}
    own: dict[str, Any] = {"beams": 20} if name == "tiger" else {"dropout": 0.0} if name != "bpr_mf" else {}
    config = validate_config({"llm": llm, "baselines": {name: own}}, source="test")
    torch.manual_seed(0)
    log = tiny_chain.log
    if name == "tiger":
        make_codes(name, log, config).save(tmp_path)
    task = make_task(name, log, config, tmp_path)
    users = log.split_users()
    histories = [np.asarray(log.history(int(user), "test")) for user in users]
    batch = task.collate(task.steps(0)[0], np.random.default_rng(0))
    losses, scores = [], []
    for device in (CPU, CUDA):
        model: Any = task.model.to(device)
        with torch.no_grad():
            losses.append(float(model(*(part.to(device) for part in batch))))
            scores.append(model.score(users, histories).cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(scores[1], scores[0], atol=1e-3, rtol=1e-3)
