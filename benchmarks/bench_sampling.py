"""What fewer denoiser calls, and fewer evaluations of its error, cost in NDCG@10, on a finished run.

Rival: the same denoiser with 200 calls, and with 64 evaluations. The published use needs 400 calls for one vector.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.report import Case, parser, show, write
from ctd_scale.artifacts import Run
from ctd_scale.batches import SPLITS, InteractionLog, Preferences, Ranking, Split
from ctd_scale.calibrate import ScoredPool, pool_ndcg, scored_pools
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.inference import DensityModel
from ctd_scale.metrics import ranks_in_lists
from ctd_scale.ranking import ndcg_gains
from ctd_scale.recommender import load_artifacts, load_retrieve

CALLS = {"small": (200, 8, 1), "full": (200, 50, 16, 8, 4, 2, 1)}
EVALUATIONS = {"small": (64, 8, 1), "full": (64, 32, 16, 8, 4, 2, 1)}
USERS = {"small": 300, "full": 2000}
DRAWS, ERROR = Ranking(0.0, 1.0, 0.0), Ranking(0.0, 0.0, 1.0)


class Bench:
    """A finished run, and some users of each split."""

    def __init__(self, run: Run, users: int) -> None:
        self.config, self.users = run.read_config(), users
        self.artifacts = {**load_artifacts(run), "preferences": run.fetch("preferences")}
        self.log = InteractionLog.load(self.artifacts["interactions"].path)
        self.taught = self.config.diffusion.sampler == "distilled"
        self.retrieve = {split: load_retrieve(self.artifacts, self.config, split) for split in SPLITS}

    def pools(self, split: Split, diffusion: DiffusionConfig) -> list[ScoredPool]:
        """Candidates and scores of the users, with a sampler of these settings."""
        told = Preferences.load(self.artifacts["preferences"].path, split)
        some = slice(0, self.users)
        told = Preferences(told.users[some], told.targets[some], told.vectors[some], [""] * len(told.users[some]))
        folder, dim = self.artifacts["models/diffusion"].path, self.config.llm.preference_dim
        density = DensityModel(folder, dim, diffusion, self.config.seed)
        mask, chunk = self.config.evaluation.mask_seen, self.config.evaluation.chunk_users
        return list(scored_pools(self.log, told, split, density, self.retrieve[split], mask_seen=mask, chunk=chunk))

    def single_ndcg(self, pools: list[ScoredPool]) -> float:
        """Of the first vector alone."""
        gains = []
        for each in pools:
            nothing: list[np.ndarray] = [np.zeros(0, np.int32)] * len(each.users)
            ids, _ = self.retrieve["test"].retriever.search(each.draws[:, 0], nothing, each.pool.excluded, 10)
            gains.append(ndcg_gains(ranks_in_lists(ids, each.targets)))
        return float(np.concatenate(gains).mean())


def spread(pools: list[ScoredPool]) -> float:
    """One minus the mean cosine of two draws of a user: 0 where all draws are one vector."""
    unit = np.concatenate([each.draws / np.linalg.norm(each.draws, axis=2, keepdims=True) for each in pools])
    count = unit.shape[1]
    pairs = np.square(np.linalg.norm(unit.sum(axis=1), axis=1)) - count
    return float(1 - pairs.mean() / (count * (count - 1)))


def calls_cases(bench: Bench, split: Split, sampler: str, calls: tuple[int, ...]) -> list[Case]:
    """NDCG@10 of many draws and of one, how unlike they are, and what a user's draws take. Where the run has a sampler
    of one call, that too."""
    ways = {f"{sampler}, {steps} calls": {"sampling_steps": steps, "sampler": sampler} for steps in calls}
    if bench.taught and sampler == "ddim":
        ways["distilled, 1 call"] = {"sampler": "distilled"}
    found: dict[str, tuple[float, float, float, float]] = {}
    for way, settings in ways.items():
        started = time.perf_counter()
        pools = bench.pools(split, bench.config.diffusion.model_copy(update={**settings, "error_evaluations": 1}))
        seconds = (time.perf_counter() - started) / sum(len(each.users) for each in pools)
        found[way] = pool_ndcg(pools, DRAWS), bench.single_ndcg(pools), spread(pools), 1e3 * seconds
    rival = f"{sampler}, {max(calls)} calls"
    cases = []
    for way, (many, single, unlike, milliseconds) in found.items():
        count = bench.config.diffusion.num_draws
        best_many, best_single, best_unlike, _ = found[rival]
        said = f"{way}, {split}"
        cases += [
            Case("calls", f"NDCG@10 of {count} draws, {said}", "", many, best_many, rival, many / best_many),
            Case("calls", f"NDCG@10 of one draw, {said}", "", single, best_single, rival, single / best_single),
            Case("calls", f"spread of the draws, {said}", "", unlike, best_unlike, rival, unlike / best_unlike),
            Case("calls", f"candidates of a user, {said}", "ms", milliseconds),
        ]
    return cases


def error_cases(bench: Bench, split: Split, evaluations: tuple[int, ...]) -> list[Case]:
    """NDCG@10 of the candidates by the denoiser's error."""
    found = {}
    for count in evaluations:
        settings = {"error_evaluations": count}
        found[count] = pool_ndcg(bench.pools(split, bench.config.diffusion.model_copy(update=settings)), ERROR)
    most = max(evaluations)
    return [
        Case(
            "error",
            f"NDCG@10 by error, {count} evaluations, {split}",
            "",
            each,
            found[most],
            f"{most}",
            each / found[most],
        )
        for count, each in found.items()
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--run", required=True, help="folder of a finished run")
    asked = options.parse_args()
    folder = Path(asked.run).resolve()
    bench = Bench(Run(str(folder.parent), folder.name), USERS[asked.size])
    cases: list[Case] = []
    for split in SPLITS:
        for sampler in ("ddim", "dpmsolver++"):
            cases += calls_cases(bench, split, sampler, CALLS[asked.size])
        cases += error_cases(bench, split, EVALUATIONS[asked.size])
    show(cases)
    write(cases, asked.json)


if __name__ == "__main__":
    main()
