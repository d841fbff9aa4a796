"""What libraries read of the environment is set before they are loaded, and what a user has set stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctd_scale import environment
from ctd_scale.artifacts import Run

SET = "THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT"
DOCKERFILE = Path(__file__).resolve().parents[2] / "cluster" / "Dockerfile"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    environment.set_defaults()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_the_command_sets_it_before_torch_is_loaded() -> None:
    script = (
        "import os, sys\nfrom ctd_scale.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('torch' in sys.modules, *(os.environ.get(name) for name in {SET}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 1 1000"


def test_the_image_sets_the_same() -> None:
    before = dict(os.environ)
    environment.set_defaults()
    found = dict(re.findall(r"([A-Z_]+)=(\S+)", "\n".join(re.findall(r"^ENV (.*)$", DOCKERFILE.read_text(), re.M))))
    wanted = {name: value for name, value in os.environ.items() if name not in before}
    assert wanted.keys() == set(SET)
    assert wanted.items() <= found.items()


def test_jax_where_it_is_installed_takes_no_gpu(tmp_path: Path) -> None:
    """bm25s computes with JAX as soon as it is imported: here with one that says on what."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    lax = "import os\ndef top_k(values, k): print('JAX on', os.environ.get('JAX_PLATFORMS'))\n"
    (tmp_path / "jax" / "lax.py").write_text(lax)
    path = os.pathsep.join([str(tmp_path), str(DOCKERFILE.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", "import ctd_scale.retrieval.text"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "JAX on cpu\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/", {"cpu.max": "half"}, 8),
        ("0::/pods/one", {"pods/one/cpu.max": "max 100000", "pods/cpu.max": "400000 100000"}, 4),
        ("0::/pods/one", {"pods/two/cpu.max": "100000 100000"}, 8),
        ("0::/host/name/of/it", {"cpu.max": "200000 100000"}, 2),
        (
            "5:memory:/a\n3:cpu,cpuacct:/b\n0::/",
            {"cpu/b/cpu.cfs_quota_us": "150000", "cpu/b/cpu.cfs_period_us": "50000"},
            3,
        ),
        ("3:cpuacct,cpu:/host/b", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_container_has_the_cores_that_its_quota_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in {"own": own, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert environment.cores(tmp_path, tmp_path / "own") == expected


def test_a_process_has_the_cores_that_it_is_bound_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 5})
    nowhere = tmp_path / "no cgroups"
    assert environment.cores(nowhere, nowhere) == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert environment.cores(nowhere, nowhere) == 8
    monkeypatch.setattr(environment, "cores", lambda: 5)
    assert [environment.share_of_cores(processes) for processes in (1, 2, 4, 8)] == [5, 2, 1, 1]


def test_a_machine_is_said_with_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["H100", "H100", "L4"][index])
    assert ", 2 x H100, 1 x L4, CPython" in environment.machine()


@pytest.mark.parametrize(
    ("can", "said"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, "cores (Intel Xeon with AMX), "),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "cores (AMD EPYC with AVX-512 BF16), "),
        ({"cpu_name": "Neoverse"}, "cores (Neoverse), "),
    ],
)
def test_a_machine_is_said_with_what_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, object], said: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert said in environment.machine()


def test_all_that_can_be_fetched_again_lies_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, folder in (("here", tmp_path / "here"), ("", Path.home() / ".cache" / "ctd-scale")):
        monkeypatch.setenv("CTD_CACHE_DIR", given)
        assert environment.cache_folder() == folder
        assert Run("s3://bucket/runs", "mine").root.is_relative_to(folder / "artifacts")
