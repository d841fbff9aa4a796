"""What an endpoint compiles before it answers, in a process of its own: in this one other tests have compiled much."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_tiny_run

pytestmark = pytest.mark.slow

COMPILED = """
import gc, sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from ctd_scale.artifacts import Run
from ctd_scale.serving.release import open_release, source_of

run = Run(*sys.argv[1:])
release = open_release(source_of(run, run.read_config()))
gc.unfreeze()  # or they would not be listed
dispatchers = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
before = {each.py_func.__name__: list(each.signatures) for each in dispatchers}
history = np.array([3, 1, 2], np.int32)
release.rank(np.ones((2, 16), np.float32), [history] * 2, ["golden river", ""], [history, history[:0]], 5)
assert len(release.rank.retrieve.find("golden garden", 10))
release.rank.retrieve.similar(3, 10)
after = {each.py_func.__name__: list(each.signatures) for each in dispatchers}
assert before["best_documents"] and before["_read"], before
assert after == before, {name: after[name] for name in after if after[name] != before[name]}
"""


def test_nothing_is_compiled_while_somebody_waits(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    command = [sys.executable, "-c", COMPILED, run.storage, run.name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
