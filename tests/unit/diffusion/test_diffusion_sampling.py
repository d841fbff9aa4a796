"""Sampling starts where the prior is, ends at what the denoiser says, and depends on (condition, seed) alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch import nn

from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.objective import add_noise, cumulative_alphas, predicted_sample
from ctd_scale.diffusion.sampler import common_noise, denoising_errors, error_probes, generate, make_scheduler

SAMPLERS = ("ddim", "dpmsolver++")
BATCH, DRAWS, DIM = 3, 4, 6


class Oracle(nn.Module):
    """Knows x_0 of every row and answers in the words of its prediction type."""

    def __init__(self, sample: torch.Tensor, config: DiffusionConfig) -> None:
        super().__init__()
        self.sample, self.kind = sample, config.prediction_type
        self.alphas = cumulative_alphas(config.num_train_timesteps, config.beta_schedule, config.prediction_type)
        self.seen: list[int] = []

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, *_: Any) -> torch.Tensor:
        self.seen.append(int(timesteps.flatten()[0]))
        sample = self.sample.expand_as(noisy)
        if self.kind == "sample":
            return sample
        alpha = self.alphas[timesteps][..., None]
        noise = (noisy - alpha.sqrt() * sample) / (1 - alpha).sqrt()
        return noise if self.kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * sample


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(DIM, hidden_dim=16, num_blocks=2, dropout=0.5).eval()
    for block in made.blocks:
        nn.init.normal_(block.modulate.weight, std=0.3)
    nn.init.normal_(made.no_condition)
    return made


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_train_timesteps", [1000, 100, 37])
@pytest.mark.parametrize("steps", range(1, 9))
def test_sampling_starts_at_the_last_training_timestep(sampler: Any, num_train_timesteps: int, steps: int) -> None:
    config = DiffusionConfig(sampler=sampler, num_train_timesteps=num_train_timesteps, sampling_steps=steps)
    scheduler = make_scheduler(config)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps[0] == num_train_timesteps - 1
    assert len(timesteps) == steps
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[-1] >= 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_generations_at_the_same_time_know_nothing_of_each_other(sampler: Any) -> None:
    """Betas are computed once, but each generation goes its own way."""

    def walk(steps: int) -> Iterator[torch.Tensor]:
        scheduler = make_scheduler(DiffusionConfig(sampler=sampler))
        scheduler.set_timesteps(steps)
        sample = common_noise(DRAWS, DIM, steps)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample.tanh(), timestep, sample).prev_sample
            yield sample

    alone = {steps: list(walk(steps)) for steps in (4, 7)}
    both = list(zip_longest(walk(4), walk(7)))
    for column, steps in enumerate((4, 7)):
        for row, expected in zip(both, alone[steps], strict=False):
            torch.testing.assert_close(row[column], expected, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_a_denoiser_that_knows_the_item_generates_exactly_that_item(sampler: Any, kind: Any, steps: int) -> None:
    config = DiffusionConfig(sampler=sampler, prediction_type=kind, sampling_steps=steps)
    item = torch.randn(BATCH, 1, DIM, generator=torch.Generator().manual_seed(0))
    oracle = Oracle(item, config)
    generated = generate(oracle, torch.zeros(BATCH, DIM), common_noise(DRAWS, DIM, 0), config)
    assert generated.shape == (BATCH, DRAWS, DIM)
    assert oracle.seen[0] == 999
    assert len(oracle.seen) == steps
    # In one step from pure noise, what is not the sample itself comes out of a division by almost nothing.
    atol = 1e-5 if kind == "sample" else 1e-2 if steps == 1 else 2e-3
    assert torch.allclose(generated, item.expand_as(generated), atol=atol)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_draw_depends_on_condition_and_seed_alone(denoiser: Denoiser, sampler: Any, guidance: float) -> None:
    config = DiffusionConfig(sampler=sampler, sampling_steps=4, guidance=guidance)
    conditions = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1))
    noise = common_noise(DRAWS, DIM, seed=5)
    together = generate(denoiser, conditions, noise, config)
    assert torch.equal(generate(denoiser, conditions, common_noise(DRAWS, DIM, seed=5), config), together)
    apart = torch.cat([generate(denoiser, row[None], noise, config) for row in conditions])
    assert torch.allclose(apart, together, atol=1e-5)
    only = generate(denoiser, conditions, noise[:1], config)
    assert torch.allclose(only[:, 0], together[:, 0], atol=1e-5)
    other = generate(denoiser, conditions, common_noise(DRAWS, DIM, seed=6), config)
    assert (other - together).abs().amax(dim=2).min() > 1e-3
    assert (together[:, 0] - together[:, 1]).abs().max(dim=1).values.min() > 1e-3, "draws differ"
    swapped = generate(denoiser, conditions.flip(0), noise, config)
    assert torch.allclose(swapped.flip(0), together, atol=1e-5)
    assert not torch.allclose(swapped, together, atol=1e-3)


def test_guidance_goes_past_the_conditioned_prediction() -> None:
    class TwoMinds(nn.Module):
        def forward(
            self, noisy: torch.Tensor, timesteps: Any, condition: Any, dropped: Any = None, *_: Any
        ) -> torch.Tensor:
            return torch.full_like(noisy, 3.0 if dropped is None else 1.0)

    for guidance in (0.0, 1.0, 2.0):
        config = DiffusionConfig(guidance=guidance)
        got = generate(TwoMinds(), torch.zeros(1, DIM), common_noise(1, DIM, 0), config)
        assert torch.allclose(got, torch.full_like(got, 1 + 2 * guidance), atol=1e-4)


# -- errors --------------------------------------------------------------------------------------------------


def test_probes_are_spread_over_the_chain_and_seeded() -> None:
    config = DiffusionConfig(error_evaluations=4, num_train_timesteps=1000)
    timesteps, noise = error_probes(config, DIM, seed=3)
    assert timesteps.tolist() == [125, 375, 625, 875]
    assert noise.shape == (4, DIM)
    assert torch.equal(error_probes(config, DIM, seed=3)[1], noise)
    assert not torch.equal(error_probes(config, DIM, seed=4)[1], noise)
    assert not torch.equal(common_noise(4, DIM, seed=3), noise), "draws and errors share no noise"


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_errors_are_those_of_a_loop(denoiser: Denoiser, kind: Any) -> None:
    config = DiffusionConfig(prediction_type=kind, num_train_timesteps=50, error_evaluations=3)
    generator = torch.Generator().manual_seed(2)
    conditions = torch.randn(BATCH, DIM, generator=generator)
    candidates = torch.randn(BATCH, 5, DIM, generator=generator)
    timesteps, noise = error_probes(config, DIM, seed=0)
    got = denoising_errors(denoiser, conditions, candidates, timesteps, noise, config)
    alphas = cumulative_alphas(50, config.beta_schedule, kind)
    with torch.no_grad():
        for user in range(BATCH):
            for place in range(5):
                total = 0.0
                for timestep, eps in zip(timesteps, noise, strict=True):
                    item, alpha = candidates[user, place], alphas[timestep][None]
                    noisy = add_noise(item, eps, alpha)
                    output = denoiser(noisy, timestep, conditions[user])
                    total += float((item - predicted_sample(output, noisy, alpha, kind)).square().mean())
                assert got[user, place].item() == pytest.approx(total / 3, rel=1e-3)


def test_the_error_of_the_known_item_is_the_lowest() -> None:
    config = DiffusionConfig(error_evaluations=3)
    items = torch.randn(BATCH, 1, DIM, generator=torch.Generator().manual_seed(0))
    candidates = torch.cat([items, items + 0.1, items - 2], dim=1)
    errors = denoising_errors(
        Oracle(items, config), torch.zeros(BATCH, DIM), candidates, *error_probes(config, DIM, 0), config
    )
    assert torch.allclose(errors, torch.tensor([0.0, 0.01, 4.0]).expand(BATCH, 3), atol=1e-5)
