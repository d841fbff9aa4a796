"""`ctd serve` in a process of its own, as it is started by hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_S, TIMEOUT_S, BODY_TIMEOUT_S = 600, 8, 1
CTD = [sys.executable, "-c", "from ctd_scale.cli import main; main()"]
RECOMMEND = "/v1/recommend"


@dataclass(frozen=True)
class Server:
    """A running `ctd serve`."""

    process: subprocess.Popen[str]
    client: httpx.Client

    def post(self, **request: Any) -> httpx.Response:
        return self.client.post(RECOMMEND, json=request)

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's only replica."""
        (found,) = (
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.name().startswith("ray::") and f":{deployment}" in "".join(child.cmdline())
        )
        return found


@contextmanager
def started(run: Path, *overrides: str, **environment: str) -> Iterator[Server]:
    """Serves a run from another folder than this one; ends the server, if nobody did, by SIGTERM."""
    ray_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: socket paths are limited
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    limits = (f"serving.request_timeout_s={TIMEOUT_S}.0", f"serving.body_timeout_s={BODY_TIMEOUT_S}.0", *overrides)
    command = [*CTD, "serve", "--run", run.name, "--port", "0", *(word for each in limits for word in ("--set", each))]
    errors = Path(ray_folder) / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=run.parent,
            env=inherited | environment | {"RAY_TMPDIR": ray_folder},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    too_late = threading.Timer(START_S, process.kill)
    too_late.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        too_late.cancel()
        url = re.search(r"at (http://\S+)", line)
        assert url is not None, line + errors.read_text()
        with httpx.Client(base_url=url[1], timeout=60) as client:
            yield Server(process, client)
    finally:
        too_late.cancel()
        process.terminate()
        process.communicate(timeout=60)
        shutil.rmtree(ray_folder, ignore_errors=True)
