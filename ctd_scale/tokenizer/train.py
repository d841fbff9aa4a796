"""Train one K-way tokenizer for the items and one for the users with Ray Train, and publish their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import NodeArrays
from ctd_scale.config import RunConfig, TokenizerConfig
from ctd_scale.terminal import console
from ctd_scale.tokenizer.kway import KWayTokenizer, draw_mask
from ctd_scale.tokenizer.losses import decorrelation_loss, reconstruction_loss, variance_loss

SIDES = ("items", "users")
# Rows that are encoded at a time: tokens are far larger than the embeddings that they are made of.
CHUNK = 8192


def train_tokenizer(run: Run, config: RunConfig, config_hash: str, token_dim: int) -> None:
    """embeddings -> models/tokenizer and tokens. `token_dim` is the hidden size of the LLM."""
    source = run.fetch("embeddings")
    export = training.run_training(
        train_loop,
        {
            "config": config.tokenizer.model_dump(),
            "seed": config.seed,
            "embeddings": str(source.path),
            "token_dim": token_dim,
        },
        run=run,
        stage="tokenizer",
        key=config_hash,
        resources=config.resources.tokenizer,
    )
    embeddings = NodeArrays.load(source.path)
    models = {side: load_tokenizer(export / f"{side}.safetensors", config.tokenizer) for side in SIDES}
    facts = {
        "num_ways": config.tokenizer.num_ways,
        "token_dim": token_dim,
        **training.usage(run, "tokenizer"),
        **{
            f"{side}_reconstruction_cosine": reconstruction_cosine(models[side], getattr(embeddings, side))
            for side in SIDES
        },
    }
    for side in SIDES:
        cosine = facts[f"{side}_reconstruction_cosine"]
        console.print(f"  tokenizer: reconstruction cosine of {side} {cosine:.4f}", highlight=False)
    inputs = {source.name: source.digest}
    with run.publish("models/tokenizer", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        for side in SIDES:
            (folder / f"{side}.safetensors").write_bytes((export / f"{side}.safetensors").read_bytes())
    with run.publish("tokens", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        for side in SIDES:
            rows = getattr(embeddings, side)
            shape = (len(rows), config.tokenizer.num_ways, token_dim)
            tokenize(models[side], rows, open_memmap(folder / f"{side}.npy", mode="w+", dtype=np.float32, shape=shape))


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: both sides step together, each with its own tokenizer."""
    config, seed = TokenizerConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    embeddings = NodeArrays.load(Path(arguments["embeddings"]))
    data = {side: torch.tensor(np.asarray(getattr(embeddings, side))).to(device) for side in SIDES}
    models, parallel = {}, {}
    for side in SIDES:
        model = KWayTokenizer(data[side].shape[1], arguments["token_dim"], config.num_ways, config.hidden_dim).to(
            device
        )
        model.fit_scale(data[side])
        models[side] = model
        parallel[side] = DistributedDataParallel(_Losses(model)) if training.world_size() > 1 else _Losses(model)
    optimizer = torch.optim.AdamW(
        [parameter for model in models.values() for parameter in model.parameters()],
        lr=config.learning_rate,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, eta_min=config.learning_rate / 50)
    step = 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
            for side in SIDES:
                models[side].load_state_dict(state[side])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            step = state["step"]

    def write(folder: Path) -> None:
        state: dict[str, Any] = {**models, "optimizer": optimizer, "schedule": schedule}
        torch.save({"step": step, **{name: part.state_dict() for name, part in state.items()}}, folder / "state.pt")
        (folder / training.EXPORT).mkdir()
        for side in SIDES:
            save_file(models[side].state_dict(), folder / training.EXPORT / f"{side}.safetensors")

    log = training.StepLog(arguments["logs"], config.steps)
    while step < config.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = torch.zeros((), device=device)
        curves: dict[str, torch.Tensor] = {}
        for side in SIDES:
            rows = torch.randint(len(data[side]), (config.batch_size,), generator=generator)
            rows = rows[training.rank() :: training.world_size()]
            batch = data[side][rows.to(device)]
            masked = draw_mask((config.batch_size, batch.shape[1]), config.mask_ratio, generator, device)
            masked = masked[training.rank() :: training.world_size()]
            terms = parallel[side](batch, masked)
            weights = (1.0, config.decorrelation_weight, config.variance_weight)
            loss = loss + sum(weight * term for weight, term in zip(weights, terms, strict=True))
            curves[f"{side}_reconstruction"] = terms[0].detach()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        log.step(step, {"loss": loss.detach(), **curves})
        if step % config.checkpoint_every_steps == 0 and step < config.steps:
            training.report_checkpoint({"step": step, "loss": loss.item()}, write)
    training.report_checkpoint({"step": step}, write)
    log.close()


class _Losses(torch.nn.Module):
    """The three terms in one forward pass, so that DDP sees one call per step."""

    def __init__(self, model: KWayTokenizer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, embeddings: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = self.model.encode(embeddings, masked)
        reconstruction = reconstruction_loss(self.model.decode(tokens), self.model.scale(embeddings))
        return reconstruction, decorrelation_loss(tokens), variance_loss(tokens)


def load_tokenizer(file: Path, config: TokenizerConfig) -> KWayTokenizer:
    """A trained tokenizer from its safetensors file."""
    state = load_file(file)
    token_dim, embed_dim = state["encoders.0.leave.weight"].shape[0], state["mean"].shape[0]
    model = KWayTokenizer(embed_dim, token_dim, config.num_ways, config.hidden_dim)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def tokenize(
    model: KWayTokenizer, embeddings: np.ndarray, out: np.ndarray | None = None, chunk: int = CHUNK
) -> np.ndarray:
    """Tokens [rows, ways, token_dim] float32 of raw embeddings, into `out` (a file, where there are many rows); nothing
    is masked here."""
    for start in range(0, len(embeddings), chunk):
        tokens = model.encode(torch.tensor(embeddings[start : start + chunk])).numpy()
        if out is None:
            out = np.empty((len(embeddings), *tokens.shape[1:]), np.float32)
        out[start : start + chunk] = tokens
    assert out is not None, "no rows"
    return out


@torch.no_grad()
def reconstruction_cosine(model: KWayTokenizer, embeddings: np.ndarray) -> float:
    """Mean cosine between the standardised embedding and its reconstruction: how much the tokens keep."""
    total = 0.0
    for start in range(0, len(embeddings), CHUNK):
        rows = torch.tensor(embeddings[start : start + CHUNK])
        total += float(F.cosine_similarity(model.decode(model.encode(rows)), model.scale(rows), dim=1).sum())
    return total / len(embeddings)
