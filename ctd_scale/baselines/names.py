"""Which baselines are trained, said without importing what trains them."""

from __future__ import annotations

from typing import Any

SEQUENTIAL = ("sasrec", "bsarec")
DISCRETE = ("p5_random", "p5_sequential", "p5_collaborative", "tiger")
TRAINED = ("bpr_mf", *SEQUENTIAL, *DISCRETE)
# By what the LLM stage is changed for each rival that it trains (llm.py).
VARIANTS: dict[str, dict[str, Any]] = {
    "text_only": {"item_tokens": "none", "recency": False},
    "collm": {"item_tokens": "projected", "token_schedule": "second_half", "recency": False},
    "llara": {"item_tokens": "projected", "token_schedule": "curriculum", "recency": False},
}
