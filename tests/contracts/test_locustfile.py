"""What the load test sends is what the endpoint takes. In a process of its own: Locust patches sockets and threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ctd_scale.serving.schema import BatchRequest, RecommendRequest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from benchmarks.locustfile import OPTIONS, RECOMMEND, BATCH, ITEMS, Visitor, batch_of, of_items, of_users
people, histories = of_users(sys.argv[1], 7), of_items(["a", "b", "c"], 7)
refused = []
for make in (lambda: of_items([], 7), lambda: of_users(sys.argv[2], 7)):
    try:
        make()
    except ValueError as error:
        refused.append(str(error))
tasks = sorted({each.__name__ for each in Visitor.tasks})
paths = [RECOMMEND, BATCH, ITEMS]
found = [people, histories, histories == of_items(["a", "b", "c"], 7), batch_of(people, 5), refused, tasks, paths]
print(json.dumps([*found, list(OPTIONS)]))
"""


def test_the_bodies_of_the_load_test_are_requests(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("u1\nu 2\n\n")
    (tmp_path / "none").write_text("\n")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "ids"), str(tmp_path / "none")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    people, histories, repeatable, batch, refused, tasks, paths, options = json.loads(ended.stdout)
    assert [RecommendRequest.model_validate(each).user_id for each in people] == ["u1", "u 2"]
    assert {len(RecommendRequest.model_validate(each).history or ()) for each in histories} == set(range(1, 11))
    assert repeatable
    assert len(BatchRequest.model_validate(batch).requests) == 5
    assert [message.split(":")[0] for message in refused] == ["--queries", f"--ids {tmp_path / 'none'}"]
    assert tasks == ["recommend", "recommend_batch"]
    assert paths == ["/v1/recommend", "/v1/recommend:batch", "/v1/items"]
    head = (ROOT / "benchmarks" / "locustfile.py").read_text(encoding="utf-8").split('"""')[1]
    assert [name for name in options if f"--{name} " not in head] == [], "documented at its head"
