"""Schedule, parametrisations and losses against diffusers and against loops; one condition per sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.objective import (
    Losses,
    add_noise,
    cumulative_alphas,
    diffusion_losses,
    min_snr_weights,
    predicted_sample,
    training_target,
    unit_variance,
)

TYPES = ("sample", "epsilon", "v_prediction")
SCHEDULES = ("linear", "squaredcos_cap_v2", "exponential")
BATCH, NEGATIVES, DIM, STEPS = 5, 3, 4, 100


# -- schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("steps", [1000, 100, 37])
def test_nothing_of_the_sample_is_left_at_the_last_timestep(steps: int, schedule: str, kind: Any) -> None:
    alphas = cumulative_alphas(steps, schedule, kind)
    assert alphas.shape == (steps,)
    assert (alphas.diff() < 0).all()
    assert alphas[0] < 1
    if kind == "epsilon":
        assert alphas[-1] > 0, "a noise prediction cannot be inverted without a trace of the sample"
    else:
        assert alphas[-1] == 0


@pytest.mark.parametrize("kind", TYPES)
def test_noise_and_targets_are_those_of_diffusers(kind: Any) -> None:
    torch.manual_seed(0)
    sample, noise = torch.randn(STEPS, DIM), torch.randn(STEPS, DIM)
    timesteps = torch.arange(STEPS)
    theirs = DDPMScheduler(STEPS, beta_schedule="linear", rescale_betas_zero_snr=kind != "epsilon")
    alpha = cumulative_alphas(STEPS, "linear", kind)[:, None]
    assert torch.allclose(add_noise(sample, noise, alpha), theirs.add_noise(sample, noise, timesteps), atol=1e-6)
    expected = {"sample": sample, "epsilon": noise, "v_prediction": theirs.get_velocity(sample, noise, timesteps)}
    assert torch.allclose(training_target(sample, noise, alpha, kind), expected[kind], atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
def test_the_true_output_gives_the_sample_back(kind: Any) -> None:
    torch.manual_seed(0)
    sample, noise = torch.randn(STEPS, DIM), torch.randn(STEPS, DIM)
    alpha = cumulative_alphas(STEPS, "squaredcos_cap_v2", kind)[:, None]
    noisy = add_noise(sample, noise, alpha)
    # Dividing by sqrt(abar) magnifies rounding where hardly anything of the sample is left.
    kept = slice(None, -8) if kind == "epsilon" else slice(None)
    back = predicted_sample(training_target(sample, noise, alpha, kind), noisy, alpha, kind)
    assert torch.allclose(back[kept], sample[kept], atol=1e-4)


def test_unit_variance_keeps_directions() -> None:
    vectors = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
    scaled = unit_variance(vectors)
    assert torch.allclose(scaled, torch.tensor([[1.2, 1.6, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]))
    assert torch.allclose(scaled.square().mean(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weighs_the_sample_alike_whatever_is_predicted(kind: Any) -> None:
    alpha = cumulative_alphas(STEPS, "linear", "epsilon")
    torch.manual_seed(0)
    noisy, wrong = torch.randn(STEPS, DIM), 0.1 * torch.randn(STEPS, DIM)
    output = torch.randn(STEPS, DIM)
    column = alpha[:, None]
    off = predicted_sample(output + wrong, noisy, column, kind) - predicted_sample(output, noisy, column, kind)
    expected = (alpha / (1 - alpha)).clamp_max(5.0) * off.square().sum(dim=1)
    assert torch.allclose(min_snr_weights(alpha, kind, 5.0) * wrong.square().sum(dim=1), expected, rtol=1e-3)
    assert torch.equal(min_snr_weights(alpha, kind, 0.0), torch.ones(STEPS))


# -- losses --------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A small fixed function of everything that a denoiser is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.mix = nn.Parameter(torch.randn(2 * DIM, DIM))

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor, dropped: Any = None, *_: Any
    ) -> torch.Tensor:
        if dropped is not None:
            condition = torch.where(dropped[..., None], 0.5, condition)
        return torch.cat([noisy, condition.expand_as(noisy)], dim=-1) @ self.mix * (1 + timesteps[..., None] / STEPS)


class Oracle(nn.Module):
    """Says the sample of its row, whatever it is given."""

    def __init__(self, sample: torch.Tensor) -> None:
        super().__init__()
        self.sample = sample

    def forward(
        self, noisy: torch.Tensor, timesteps: Any, condition: Any, dropped: Any = None, *_: Any
    ) -> torch.Tensor:
        return self.sample.expand_as(noisy)


def drawn() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "condition": torch.randn(BATCH, DIM),
        "positive": unit_variance(torch.randn(BATCH, DIM)),
        "negatives": unit_variance(torch.randn(BATCH, NEGATIVES, DIM)),
        "timesteps": torch.tensor([0, 10, 50, 90, 99]),
        "noise": torch.randn(BATCH, DIM),
        "dropped": torch.tensor([False, True, False, False, True]),
        "temperature": 0.2,
    }


@pytest.mark.parametrize(("contrasted", "min_snr"), [(1, 0.0), (3, 5.0)])
@pytest.mark.parametrize("kind", TYPES)
def test_the_three_losses_one_sample_at_a_time(kind: Any, contrasted: int, min_snr: float) -> None:
    batch, denoiser = drawn(), Linear()
    alphas = cumulative_alphas(STEPS, "linear", kind)
    options = {"alphas": alphas, "prediction_type": kind, "contrasted": contrasted, "min_snr": min_snr}
    got = diffusion_losses(denoiser, **batch, **options)
    terms = []
    for row in range(BATCH):
        alpha, noise = float(alphas[batch["timesteps"][row]]), batch["noise"][row]
        errors, samples = [], []
        for item in (batch["positive"][row], *batch["negatives"][row, :contrasted]):
            noisy = math.sqrt(alpha) * item + math.sqrt(1 - alpha) * noise
            output = denoiser(noisy, batch["timesteps"][row], batch["condition"][row], batch["dropped"][row])
            target = {
                "sample": item,
                "epsilon": noise,
                "v_prediction": math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * item,
            }[kind]
            errors.append(float((output - target).detach().square().mean()))
            samples.append(predicted_sample(output.detach(), noisy, torch.tensor([alpha]), kind))
        cosines = [
            float(F.cosine_similarity(samples[0], item, dim=0)) / batch["temperature"]
            for item in (batch["positive"][row], *batch["negatives"][row])
        ]
        partition = sum(math.exp(cosine - cosines[0]) for cosine in cosines)
        good, *bad = errors
        snr = alpha / (1 - alpha)
        in_terms_of_the_sample = {"sample": 1.0, "epsilon": 1 / max(snr, 1e-8), "v_prediction": 1 / (snr + 1)}[kind]
        weight = min(snr, min_snr) * in_terms_of_the_sample if min_snr else 1.0
        terms.append((weight * good, math.log(1 + sum(math.exp(good - error) for error in bad)), math.log(partition)))
    for value, expected in zip(got, np.mean(terms, axis=0), strict=True):
        assert value.item() == pytest.approx(expected, rel=1e-3)


def test_the_contrastive_loss_falls_as_the_error_of_the_negative_grows() -> None:
    batch = drawn()
    alphas = cumulative_alphas(STEPS, "linear", "sample")
    direction = torch.randn(BATCH, DIM)
    losses: list[Losses] = []
    for distance in (0.0, 0.5, 1.0, 2.0):
        batch["negatives"][:, 0] = batch["positive"] + distance * direction
        losses.append(diffusion_losses(Oracle(batch["positive"]), **batch, alphas=alphas, prediction_type="sample"))
    values = [loss.contrastive.item() for loss in losses]
    assert values[0] == pytest.approx(math.log(2), rel=1e-5)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5 * values[0]
    assert all(loss.denoising.item() == 0 for loss in losses)


def test_the_recommendation_loss_wants_the_positive_nearest() -> None:
    batch = drawn()
    alphas = cumulative_alphas(STEPS, "linear", "sample")
    right = diffusion_losses(Oracle(batch["positive"]), **batch, alphas=alphas, prediction_type="sample")
    wrong = diffusion_losses(Oracle(batch["negatives"][:, 2]), **batch, alphas=alphas, prediction_type="sample")
    assert right.recommendation < wrong.recommendation - 1


# -- denoiser ------------------------------------------------------------------------------------------------


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(DIM, hidden_dim=16, num_blocks=2, dropout=0.5).eval()
    for block in made.blocks:  # blocks start as the identity: give the condition its say
        nn.init.normal_(block.modulate.weight, std=0.3)
    nn.init.normal_(made.no_condition)
    return made


def test_a_condition_acts_on_its_own_row_alone(denoiser: Denoiser) -> None:
    noisy, timesteps, condition = torch.randn(4, DIM), torch.tensor([1, 5, 5, 80]), torch.randn(4, DIM)
    before = denoiser(noisy, timesteps, condition)
    assert before.shape == (4, DIM)
    changed = condition.clone()
    changed[2] += 1
    after = denoiser(noisy, timesteps, changed)
    assert torch.allclose(after[[0, 1, 3]], before[[0, 1, 3]], atol=1e-6)
    assert not torch.allclose(after[2], before[2], atol=1e-3)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(denoiser(noisy[order], timesteps[order], condition[order]), before[order], atol=1e-6)


def test_leading_dimensions_are_free(denoiser: Denoiser) -> None:
    noisy, condition = torch.randn(2, 3, DIM), torch.randn(2, 3, DIM)
    timesteps = torch.randint(99, (2, 3))
    flat = denoiser(noisy.reshape(6, DIM), timesteps.reshape(6), condition.reshape(6, DIM))
    assert torch.allclose(denoiser(noisy, timesteps, condition).reshape(6, DIM), flat, atol=1e-6)


def test_a_shared_condition_is_the_same_condition_for_each(denoiser: Denoiser) -> None:
    noisy, condition = torch.randn(2, 3, DIM), torch.randn(2, 1, DIM)
    timesteps, dropped = torch.tensor([[7], [80]]), torch.tensor([[True], [False]])
    each = denoiser(noisy, timesteps.expand(2, 3), condition.expand(2, 3, DIM), dropped.expand(2, 3))
    assert torch.allclose(denoiser(noisy, timesteps, condition, dropped), each, atol=1e-6)


def test_input_timestep_and_condition_all_count_unless_the_condition_is_dropped(denoiser: Denoiser) -> None:
    noisy, timesteps, condition = torch.randn(3, DIM), torch.tensor([1, 5, 80]), torch.randn(3, DIM)
    dropped = torch.tensor([True, False, True])
    before = denoiser(noisy, timesteps, condition, dropped)
    for other in (
        denoiser(noisy + 1, timesteps, condition, dropped),
        denoiser(noisy, timesteps + 10, condition, dropped),
    ):
        assert ((other - before).abs().max(dim=1).values > 1e-3).all()
    changed = denoiser(noisy, timesteps, condition + 1, dropped)
    assert torch.equal(changed[[0, 2]], before[[0, 2]])
    assert not torch.allclose(changed[1], before[1], atol=1e-3)
    kept = denoiser(noisy, timesteps, condition, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(kept, denoiser(noisy, timesteps, condition))
