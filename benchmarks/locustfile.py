"""Load from other machines than the server's: `ctd bench serve` shares the cores that it measures, this does not.

On each machine that asks:

    pip install -c constraints.txt '.[bench]'
    locust -f benchmarks/locustfile.py --host http://SERVER:8000 --users 200 --spawn-rate 20 --run-time 5m --headless

Further machines: the same with `--master` on one of them, and `--worker --master-host HOST` on the others. Without
`--headless` there is a page at port 8089. The server must listen on more than itself (`ctd serve --host 0.0.0.0`).

    --ids FILE          whom to ask for: a user id of the log a line. Without it the histories are of items that
    --queries the,a     these words find by /v1/items?query=, of which some must be there
    --k 10              how many items
    --batch 10          requests of a batch; one call in eleven is a batch
    --think 0.5,2       seconds that a visitor waits between two calls: at least, at most

Each is also read from the environment: CTD_IDS, CTD_QUERIES and so on. A call that is answered 429 (the queue is full)
or 504 (too late) is a failure in Locust's table: the load at which they begin is what the server can bear.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locust import HttpUser, events, task

RECOMMEND, BATCH, ITEMS = "/v1/recommend", "/v1/recommend:batch", "/v1/items"
FOUND_ITEMS, MAX_HISTORY, HISTORIES = 50, 10, 1000
OPTIONS = {"ids": "", "queries": "the,a", "k": 10, "batch": 10, "think": "0.5,2"}


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    """What the head of this file lists."""
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, env_var=f"CTD_{name.upper()}")


def of_users(path: str, k: int) -> list[dict[str, Any]]:
    """A request for each user id of a file. Raises ValueError where it has none."""
    ids = Path(path).read_text(encoding="utf-8").split("\n")
    bodies = [{"user_id": user_id, "k": k} for user_id in ids if user_id]
    if not bodies:
        raise ValueError(f"--ids {path}: is empty, expected a user id of the log a line")
    return bodies


def of_items(item_ids: Sequence[str], k: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests after histories of one to ten of these items, drawn with the seed. Raises ValueError without items."""
    if not item_ids:
        raise ValueError("--queries: no item has these words; give others of its titles, or --ids FILE")
    draw = random.Random(seed)
    lengths = [draw.randint(1, MAX_HISTORY) for _ in range(HISTORIES)]
    return [{"history": draw.choices(item_ids, k=length), "k": k} for length in lengths]


def batch_of(bodies: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """A batch of some of these requests."""
    return {"requests": random.choices(bodies, k=size)}


class Visitor(HttpUser):  # type: ignore[misc]
    """Asks, looks at the answer for a while, asks again."""

    bodies: list[dict[str, Any]] = []  # noqa: RUF012  (made once a process: all visitors draw from the same)

    def wait_time(self) -> float:
        """Seconds until the next call."""
        low, high = map(float, self.environment.parsed_options.think.split(","))
        return random.uniform(low, high)

    def on_start(self) -> None:
        """Whom to ask for, unless another visitor of this process knows it already."""
        options = self.environment.parsed_options
        if not Visitor.bodies:
            Visitor.bodies = of_users(options.ids, options.k) if options.ids else of_items(self._found(), options.k)

    def _found(self) -> list[str]:
        found: dict[str, None] = {}
        for word in self.environment.parsed_options.queries.split(","):
            with self.client.get(
                ITEMS, params={"query": word, "k": FOUND_ITEMS}, name=f"{ITEMS}?query=", catch_response=True
            ) as answer:
                found |= dict.fromkeys(item["item_id"] for item in answer.json().get("items", []))
        return list(found)

    @task(10)  # type: ignore[untyped-decorator]
    def recommend(self) -> None:
        """One request."""
        self.client.post(RECOMMEND, json=random.choice(self.bodies))

    @task(1)  # type: ignore[untyped-decorator]
    def recommend_batch(self) -> None:
        """Several at once."""
        self.client.post(BATCH, json=batch_of(self.bodies, self.environment.parsed_options.batch))
