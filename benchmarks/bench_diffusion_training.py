"""Training the denoiser: samples a second of the stage (Ray Train, one worker) and of a plain loop in one process.

Both make the same steps of the same sizes, on one thread each, one after the other. Starting Ray and its worker is left
out; checkpoints, events and progress are the stage's own and count.
"""

from __future__ import annotations

import tempfile
import time
from copy import deepcopy

import numpy as np
import torch

from benchmarks.report import Case, parser, show, write
from ctd_scale.artifacts import Run
from ctd_scale.batches import Preferences
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.objective import cumulative_alphas, diffusion_losses, unit_variance
from ctd_scale.diffusion.train import train_diffusion

DIM, ITEMS = 64, 2000
ROWS = {"small": 20_000, "full": 100_000}
ROUNDS = 3


def made_run(folder: str, data: Preferences) -> Run:
    """Preferences as the LLM stage would publish them."""
    run = Run(folder, "run")
    with run.publish("models/llm", config_hash="bench", inputs={}, facts={}) as target:
        (target / "none").write_text("")
    inputs = {"models/llm": run.fetch("models/llm").digest}
    with run.publish("preferences", config_hash="bench", inputs=inputs, facts={}) as target:
        data.save(target, "train")
    return run


def of_the_stage(run: Run, config: RunConfig, vectors: np.ndarray, attempt: int) -> float:
    """Seconds of training, by the stage's own manifest."""
    train_diffusion(run, config, f"bench{attempt}", vectors)
    return float(run.fetch("models/diffusion").manifest["facts"]["training_seconds"])


def of_a_plain_loop(data: Preferences, config: DiffusionConfig, vectors: np.ndarray) -> float:
    """Seconds of the same steps, written as one would without a cluster."""
    conditions, table = unit_variance(torch.tensor(data.vectors)), unit_variance(torch.tensor(vectors))
    targets = torch.tensor(data.targets, dtype=torch.long)
    alphas = cumulative_alphas(config.num_train_timesteps, config.beta_schedule, config.prediction_type)
    model = Denoiser(DIM, config.hidden_dim, config.num_blocks, config.dropout)
    average = deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    size = config.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * (len(data) // size))
    started = time.perf_counter()
    for _ in range(config.epochs):
        order = torch.randperm(len(data))
        for start in range(0, len(data) - size + 1, size):
            rows = order[start : start + size]
            losses = diffusion_losses(
                model,
                condition=conditions[rows],
                positive=table[targets[rows]],
                negatives=table[torch.randint(len(table), (size, config.num_negatives))],
                timesteps=torch.randint(config.num_train_timesteps, (size,)),
                noise=torch.randn(size, DIM),
                dropped=torch.rand(size) < config.condition_dropout,
                alphas=alphas,
                prediction_type=config.prediction_type,
                temperature=config.temperature,
            )
            loss = losses.denoising + config.contrastive_weight * losses.contrastive
            loss = loss + config.recommendation_weight * losses.recommendation
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, current in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(current, 1 - config.ema_decay)
    return time.perf_counter() - started


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    random, rows = np.random.default_rng(0), ROWS[options.size]
    vectors = random.standard_normal((ITEMS, DIM)).astype(np.float32)
    targets = random.integers(0, ITEMS, rows).astype(np.int32)
    told = random.standard_normal((rows, DIM)).astype(np.float32)
    data = Preferences(np.zeros(rows, np.int32), targets, told, [""] * rows)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        run = made_run(folder, data)
        for size in (128, 1024):
            values = {"diffusion": {"epochs": 2, "batch_size": size}}
            config = validate_config({**values, "resources": {"diffusion": {"threads_per_worker": 1}}}, "bench")
            ours, plain = [], []
            for attempt in range(ROUNDS):
                plain.append(of_a_plain_loop(data, config.diffusion, vectors))
                ours.append(of_the_stage(run, config, vectors, size + attempt))
            samples = config.diffusion.epochs * (rows // size) * size
            fast, rival = samples / float(np.median(ours)), samples / float(np.median(plain))
            name = f"training, steps of {size}"
            cases.append(Case("diffusion", name, "samples/s", fast, rival, "a plain loop", fast / rival))
    show(cases)
    write(cases, options.json)


if __name__ == "__main__":
    main()
