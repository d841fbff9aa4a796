"""The denoiser as a density: candidate errors a second, on one thread.

Rival: the same denoiser given every candidate's timestep and condition, as if no two of them shared one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.report import Case, parser, show, write
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.sampler import common_noise, denoising_errors, error_probes, generate

DIM, USERS = 64, 32
POOLS = {"small": (100, 400), "full": (100, 400, 1600)}


class OneContextEach(Denoiser):
    """Expands what candidates share before anything is computed from it."""

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: torch.Tensor,
        dropped: torch.Tensor | None = None,
        latest: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shape = noisy.shape[:-1]
        each = dropped.expand(shape) if dropped is not None else None
        return super().forward(noisy, timesteps.expand(shape), condition.expand_as(noisy), each, latest)


def seconds(*works: Callable[[], object], rounds: int = 5) -> list[float]:
    """The best of some rounds for each, in turn, so that a busy moment falls on all of them."""
    best = [float("inf")] * len(works)
    for _ in range(rounds):
        for index, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[index] = min(best[index], time.perf_counter() - started)
    return best


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = DiffusionConfig()
    shape = (DIM, config.hidden_dim, config.num_blocks, config.dropout)
    ours, rival = Denoiser(*shape).eval(), OneContextEach(*shape).eval()
    rival.load_state_dict(ours.state_dict())
    conditions, noise = torch.randn(USERS, DIM), common_noise(config.num_draws, DIM, seed=0)

    def case(name: str, unit: str, amount: int, work: Callable[[Denoiser], object]) -> Case:
        fast, slow = (amount / each for each in seconds(lambda: work(ours), lambda: work(rival)))
        return Case("diffusion", name, unit, fast, slow, "a context each", fast / slow)

    cases = [
        case(
            f"{config.num_draws} draws of {USERS} users, {config.sampling_steps} steps",
            "vectors/s",
            USERS * config.num_draws,
            lambda model: generate(model, conditions, noise, config),
        )
    ]
    probes = error_probes(config, DIM, seed=0)
    for pool in POOLS[options.size]:
        candidates = torch.randn(USERS, pool, DIM)

        def errors(model: Denoiser, candidates: torch.Tensor = candidates) -> object:
            return denoising_errors(model, conditions, candidates, *probes, config)

        name = f"errors of {pool} candidates of {USERS} users, {config.error_evaluations} evaluations"
        cases.append(case(name, "candidates/s", USERS * pool, errors))
    show(cases)
    write(cases, options.json)


if __name__ == "__main__":
    main()
