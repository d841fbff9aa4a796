"""What a search may vary: ranges in words, and which settings a trial can set for itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical

from ctd_scale.baselines.names import TRAINED, VARIANTS
from ctd_scale.config import ConfigError, RunConfig, load_config, section_values
from ctd_scale.pipeline import ALL_STAGES, BASELINES, Stage, sections_of, stage_named

AFTER_DIFFUSION = ("train_diffusion", "calibrate_ranking")
_BETWEEN = re.compile(r"([^.].*?)\.\.(.+)")


def read_range(text: str) -> tuple[str, Any]:
    """`stage.key=low..high` (log-uniform where both are above 0, whole numbers where both are) or `stage.key=a,b,c`, in
    Ray Tune's words. Raises ConfigError naming what was expected."""
    key, separator, values = text.partition("=")
    if not separator or not key or not values:
        raise ConfigError(f"--range {text}: expected stage.key=low..high or stage.key=a,b,c")
    between = _BETWEEN.fullmatch(values)
    if between is None:
        return key, tune.choice(values.split(","))
    try:
        low, high = (json.loads(end) for end in between.groups())
        if not low < high:
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(f"--range {text}: expected two numbers low..high, the lower first") from None
    if isinstance(low, int) and isinstance(high, int):
        return key, tune.randint(low, high + 1)
    return key, tune.loguniform(low, high) if low > 0 else tune.uniform(low, high)


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a trial as `stage.key=value`; numbers are rounded to four digits, so that what is written down
    is what was trained."""
    return [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()]


def overrides_of_each(key: str, domain: Any) -> list[list[str]]:
    """As `overrides_of`, all that a choice may give, and of what lies between two numbers the lower one."""
    values = domain.categories if isinstance(domain, Categorical) else [domain.lower]
    return [overrides_of({key: value}) for value in values]


def trial_stages(stage: Stage) -> list[Stage]:
    """What a trial runs. Raises ConfigError where it would not be ranked on validation."""
    alone = ("train_graph", "train_history", "train_llm", *(each.name for each in BASELINES))
    tuned = {name: [name] for name in alone} | {"train_diffusion": list(AFTER_DIFFUSION)}
    if stage.name not in tuned:
        names = ", ".join(name.removeprefix("train_") for name in tuned)
        raise ConfigError(f"{stage.name} is not ranked on validation by itself; what can be tuned: {names}")
    return [stage_named(name) for name in tuned[stage.name]]


def require_own(asked: str, stages: Sequence[Stage], settings: RunConfig, space: Mapping[str, Any]) -> None:
    """Raises ConfigError for a range of what no trial can set for itself: what its stages do not read, what shapes what
    all trials link to, and how they are ranked."""
    shared, read = _upstream(stages, settings), {name for stage in stages for name in sections_of(stage, settings)}
    own = {name for name in read if name.partition(".")[0] != "evaluation"}
    own -= {name for name in read for stage in shared if _shapes(name, stage, settings)}
    for key in space:
        if not any(_shapes(key, stage, settings) for stage in stages):
            names = ", ".join(sorted({name.rpartition(".")[0] or name for name in own}))
            raise ConfigError(f"--range {key}: {asked} does not depend on it; expected a setting in {names}")
        one = f"give it one value with --set {key}=VALUE"
        if key.partition(".")[0] == "evaluation":
            raise ConfigError(f"--range {key}: trials are compared by it; {one}")
        for stage in shared:
            if _shapes(key, stage, settings):
                raise ConfigError(
                    f"--range {key}: {stage.name}, whose {stage.outputs[0]} all trials share, would have to be made "
                    f"anew for each value; {one}"
                )


def _shapes(key: str, stage: Stage, settings: RunConfig) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in sections_of(stage, settings))


def _upstream(stages: Sequence[Stage], settings: RunConfig) -> list[Stage]:
    """All stages that make what these read and do not make themselves, and what that is made from."""
    wanted, found = linked_inputs(stages), {stage.name for stage in stages}
    while wanted:
        name = wanted.pop()
        for maker in ALL_STAGES:
            if name in maker.outputs and maker.name not in found:
                found.add(maker.name)
                wanted += maker.inputs
    if not settings.history.num_blocks:
        found.discard("train_history")  # it makes the same then, whatever else is set
    return [stage for stage in ALL_STAGES if stage.name in found and stage not in stages]


def require_ranked(stage: Stage, config: str, overrides: Sequence[str], space: Mapping[str, Any]) -> None:
    """Raises ConfigError where a trial could have nothing by which it is ranked."""
    name = stage.name.removeprefix("train_")
    section = f"baselines.{name}" if name in TRAINED else "llm" if name in VARIANTS else name
    needed: dict[str, tuple[int, str]] = {}
    if name == "history":
        needed["history.num_blocks"] = (2, "nothing is trained that could be tuned")
    if name not in ("graph", "diffusion"):  # which are ranked once they are trained
        needed[f"{section}.validation_users"] = (1000, "nobody is left to rank a trial by")
    for key, (usual, why) in needed.items():
        for one in overrides_of_each(key, space[key]) if key in space else [[]]:
            if not section_values(load_config(config, [*overrides, *one]), [key])[key]:
                mend = f"leave 0 out of --range {key}" if key in space else f"--set {key}={usual}"
                raise ConfigError(f"{key}=0, so {why}; {mend}")


def linked_inputs(stages: Sequence[Stage]) -> list[str]:
    """All that these stages read and do not make themselves."""
    made = {name for stage in stages for name in stage.outputs}
    return sorted({name for stage in stages for name in stage.inputs} - made)
