"""Artifacts are published whole or not at all, and refused when a byte or an input differs; locally and by URL."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctd_scale import artifacts
from ctd_scale.artifacts import MAKERS, SCHEMA_VERSION, Artifact, ArtifactError, Run, link_artifact
from ctd_scale.config import RunConfig


@pytest.fixture(params=["local", "url"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    storage = str(tmp_path / "storage")
    return Run(storage if request.param == "local" else f"file://{storage}", "demo", cache=tmp_path / "cache")


def stored(run: Run) -> Path:
    """Where the run's artifacts really lie."""
    return Path(run.url.removeprefix("file://"))


def publish(run: Run, name: str = "models/llm", content: str = "one", inputs: dict[str, str] | None = None) -> Artifact:
    with run.publish(name, config_hash="abc", inputs=inputs or {}, facts={"rows": 3}) as folder:
        (folder / "inner").mkdir()
        (folder / "a.txt").write_text(content)
        (folder / "inner" / "b.bin").write_bytes(bytes(range(256)))
    return run.fetch(name)


def publish_half(run: Run, name: str) -> None:
    with run.publish(name, config_hash="x", inputs={}) as folder:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt


def other_machine(run: Run, tmp_path: Path) -> Run:
    """The same run, seen with an empty cache."""
    return Run(run.storage, run.name, cache=tmp_path / "elsewhere")


# -- publish and fetch ---------------------------------------------------------------------------------------


def test_what_was_published_is_fetched(run: Run) -> None:
    assert run.manifest("models/llm") is None
    artifact = publish(run)
    assert (artifact.path / "a.txt").read_text() == "one"
    assert (artifact.path / "inner" / "b.bin").read_bytes() == bytes(range(256))
    manifest = artifact.manifest
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert (manifest["config_hash"], manifest["facts"]) == ("abc", {"rows": 3})
    assert set(manifest["files"]) == {"a.txt", "inner/b.bin"}
    assert manifest["files"]["inner/b.bin"]["bytes"] == 256
    assert manifest == json.loads((stored(run) / "models" / "llm" / "manifest.json").read_text())


def test_facts_may_be_filled_while_writing(run: Run) -> None:
    facts: dict[str, Any] = {}
    with run.publish("index", config_hash="abc", inputs={}, facts=facts) as folder:
        (folder / "a.txt").write_text("x")
        facts["rows"] = 9
    assert run.fetch("index").manifest["facts"] == {"rows": 9}


def test_the_digest_is_the_content(run: Run) -> None:
    one = publish(run)
    assert publish(run).digest == one.digest
    assert publish(run, content="two").digest != one.digest
    assert publish(run, name="tokens").digest == one.digest


def test_a_second_publication_replaces_the_first_whole(run: Run) -> None:
    publish(run)
    with run.publish("models/llm", config_hash="abc", inputs={}) as folder:
        (folder / "c.txt").write_text("new")
    assert sorted(path.name for path in run.fetch("models/llm").path.iterdir()) == ["c.txt", "manifest.json"]
    assert not (stored(run) / "models" / "llm" / "a.txt").exists()


def test_what_is_linked_outlives_another_publication_of_its_source(tmp_path: Path) -> None:
    base, own = Run(str(tmp_path), "base"), Run(str(tmp_path), "own")
    first = publish(base).digest
    for _ in range(2):  # the second takes the place of the first
        link_artifact("models/llm", base, own)
    second = publish(base, content="two").digest
    assert (own.fetch("models/llm").digest, base.fetch("models/llm").digest) == (first, second)
    assert not list((own.root / ".staging").iterdir())


def test_nothing_is_left_in_the_way(run: Run) -> None:
    publish(run)
    publish(run, content="two")
    assert not [path for path in run.root.rglob("*") if path.is_file() and ".staging" in path.parts]
    assert [path.name for path in (stored(run) / "models").iterdir()] == ["llm"]


# -- refusals ------------------------------------------------------------------------------------------------


def test_without_a_manifest_it_is_not_published(run: Run) -> None:
    publish(run)
    (stored(run) / "models" / "llm" / "manifest.json").unlink()
    assert run.manifest("models/llm") is None
    with pytest.raises(ArtifactError, match=r"demo/models/llm is not published; rerun train_llm"):
        run.fetch("models/llm")


@pytest.mark.parametrize("file", ["a.txt", "inner/b.bin"])
def test_an_edited_byte_is_named(run: Run, tmp_path: Path, file: str) -> None:
    publish(run)
    path = stored(run) / "models" / "llm" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader = other_machine(run, tmp_path)
    with pytest.raises(ArtifactError, match=rf"{file} was changed after it was published.*rerun train_llm"):
        reader.fetch("models/llm")
    assert reader.fetch("models/llm", verify=False).manifest == run.manifest("models/llm")


def test_a_missing_file_is_named(run: Run, tmp_path: Path) -> None:
    publish(run)
    (stored(run) / "models" / "llm" / "inner" / "b.bin").unlink()
    with pytest.raises(ArtifactError, match=r"inner/b\.bin is missing; rerun train_llm"):
        other_machine(run, tmp_path).fetch("models/llm")


def test_a_damaged_manifest_or_another_schema_is_refused(run: Run) -> None:
    publish(run)
    path = stored(run) / "models" / "llm" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is not JSON .*rerun train_llm"):
        run.fetch("models/llm")
    path.write_text("[]")
    with pytest.raises(ArtifactError, match=r"manifest\.json is no JSON object; rerun train_llm"):
        run.fetch("models/llm")
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "files"}))
    with pytest.raises(ArtifactError, match=r"manifest\.json has no 'files'; rerun train_llm"):
        run.fetch("models/llm")
    path.write_text(json.dumps({**manifest, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(ArtifactError, match=rf"schema version {SCHEMA_VERSION + 1}.*rerun train_llm"):
        run.fetch("models/llm")


def test_other_inputs_are_refused_with_the_command_to_rerun(run: Run) -> None:
    first = publish(run, "interactions", "first")
    llm = publish(run, "models/llm", inputs={"interactions": first.digest})
    run.require_made_from(llm, first)
    second = publish(run, "interactions", "second")
    with pytest.raises(ArtifactError, match=r"models/llm was made from another interactions .*; rerun train_llm"):
        run.require_made_from(llm, second)
    run.require_made_from(second, llm)  # what was no input is no matter


def test_every_artifact_of_the_chain_has_a_command_that_makes_it() -> None:
    from ctd_scale.pipeline import STAGES

    assert {output: stage.name for stage in STAGES for output in stage.outputs} == MAKERS


# -- interruptions -------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_artifact(run: Run) -> None:
    old = publish(run)
    with pytest.raises(KeyboardInterrupt):
        publish_half(run, "models/llm")
    assert run.fetch("models/llm").digest == old.digest
    assert not list((run.root / ".staging").iterdir())


def test_an_error_before_the_manifest_leaves_the_old_artifact(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    old = publish(run)

    def killed(path: Path, text: str) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_text", killed)
        with pytest.raises(OSError, match="disk full"):
            publish(run, content="two")
    assert run.fetch("models/llm").digest == old.digest
    assert (run.fetch("models/llm").path / "a.txt").read_text() == "one"


def test_a_first_publication_that_is_interrupted_publishes_nothing(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        publish_half(run, "index")
    with pytest.raises(ArtifactError, match="is not published; rerun build_index"):
        run.fetch("index")


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_an_interrupted_upload_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
    from fsspec.implementations.local import LocalFileSystem

    run = Run(f"file://{tmp_path}/storage", "demo", cache=tmp_path / "cache")
    put, calls = LocalFileSystem.put_file, []
    publish(run)

    def dying(self: LocalFileSystem, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == dies_at:
            raise ConnectionError("gone")
        return put(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", dying)
        with pytest.raises(ConnectionError):
            publish(run, content="two")
    with pytest.raises(ArtifactError, match="is not published; rerun train_llm"):
        other_machine(run, tmp_path).fetch("models/llm")
    assert publish(run, content="two").manifest["files"].keys() == {"a.txt", "inner/b.bin"}


@pytest.mark.parametrize("dies_after", [1, 2])
def test_an_interrupted_removal_before_an_upload_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    """An object store removes a folder file by file: the manifest has to go first."""
    from fsspec.implementations.local import LocalFileSystem

    run = Run(f"file://{tmp_path}/storage", "demo", cache=tmp_path / "cache")
    publish(run)
    removed: list[str] = []

    def remove_file(self: LocalFileSystem, path: str) -> None:
        if len(removed) == dies_after:
            raise ConnectionError("gone")
        removed.append(Path(path).name)
        Path(path).unlink()

    def remove(self: LocalFileSystem, path: str, recursive: bool = False) -> None:
        for file in self.find(path) if recursive else [path]:
            remove_file(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "rm_file", remove_file)
        patch.setattr(LocalFileSystem, "rm", remove)
        with pytest.raises(ConnectionError):
            publish(run, content="two")
    with pytest.raises(ArtifactError, match="is not published; rerun train_llm"):
        other_machine(run, tmp_path).fetch("models/llm")


# -- runs ----------------------------------------------------------------------------------------------------


def test_a_run_is_opened_by_its_folder_or_url(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no run at .*demo: .*run\.toml does not exist; `ctd run"):
        Run.open(run.url)
    run.write_config(RunConfig(seed=4))
    opened = Run.open(f"{run.url}/")
    assert (opened.url, opened.name) == (run.url, "demo")
    assert other_machine(run, tmp_path).read_config() == RunConfig(seed=4)


def test_a_folder_of_the_root_is_not_one_of_here(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(str(tmp_path), "demo-of-a-test").write_config(RunConfig())
    monkeypatch.chdir(tmp_path)
    assert Run.open("demo-of-a-test").root == tmp_path / "demo-of-a-test"
    with pytest.raises(ArtifactError, match="no run at /demo-of-a-test"):
        Run.open("/demo-of-a-test")


def test_while_one_process_makes_something_of_a_run_another_does_not(run: Run) -> None:
    code = (
        "import sys; from ctd_scale.artifacts import Run\n"
        "with Run(*sys.argv[1:3], cache=__import__('pathlib').Path(sys.argv[3])).alone():\n"
        "    print('has it', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, run.storage, run.name, str(run.cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(ArtifactError, match=rf"{run.url} is being made by another process \(pid {other.pid}\)"):
            run.alone().__enter__()
        other.kill()
        other.wait()
    with run.alone(), run.alone():  # what was killed leaves nothing behind
        pass
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout == b"has it\n"


def test_a_file_system_without_locks_keeps_nobody_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(artifacts.fcntl, "flock", flock)

    refuses(errno.ENOLCK)
    with run.alone():
        pass
    refuses(errno.EIO)
    with pytest.raises(OSError, match="no"):
        run.alone().__enter__()


def test_a_manifest_says_what_it_was_made_with(run: Run) -> None:
    publish(replace(run, settings={"llm.epochs": 3}))
    assert run.fetch("models/llm").manifest["settings"] == {"llm.epochs": 3}


def test_a_download_is_kept_and_read_again(tmp_path: Path) -> None:
    run = Run(f"file://{tmp_path}/storage", "demo", cache=tmp_path / "cache")
    publish(run)
    reader = other_machine(run, tmp_path)
    first = reader.fetch("models/llm")
    assert first.path.is_relative_to(tmp_path / "elsewhere")
    shutil.rmtree(stored(run) / "models" / "llm" / "inner")
    assert reader.fetch("models/llm").path == first.path
    assert reader.fetch("models/llm").digest == first.digest


@pytest.mark.parametrize("damage", ["changed", "missing", "gone"])
def test_a_download_that_was_damaged_is_fetched_again(tmp_path: Path, damage: str) -> None:
    run = Run(f"file://{tmp_path}/storage", "demo", cache=tmp_path / "cache")
    digest = publish(run).digest
    cached = run.fetch("models/llm").path
    if damage == "gone":
        (cached / "manifest.json").unlink()
    elif damage == "changed":
        (cached / "a.txt").write_text("two")
    else:
        (cached / "inner" / "b.bin").unlink()
    found = run.fetch("models/llm")
    assert (found.path, found.digest, (found.path / "a.txt").read_text()) == (cached, digest, "one")
    assert (found.path / "inner" / "b.bin").read_bytes() == bytes(range(256))
    assert [path.name for path in run.cache.glob("*-*")] == []


def test_a_download_that_somebody_else_has_ended_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have mapped its files by then."""
    from fsspec.implementations.local import LocalFileSystem

    run = Run(f"file://{tmp_path}/storage", "demo", cache=tmp_path / "cache")
    publish(run)
    reader, get = other_machine(run, tmp_path), LocalFileSystem.get_file
    seen: list[int] = []

    def slow(self: LocalFileSystem, source: str, target: str, **options: Any) -> Any:
        if source.endswith("manifest.json") and not seen:
            seen.append(0)
            seen[0] = (reader.fetch("models/llm").path / "a.txt").stat().st_ino
        return get(self, source, target, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", slow)
    found = reader.fetch("models/llm")
    assert (found.path / "a.txt").stat().st_ino == seen[0]
    assert [path.name for path in reader.cache.iterdir()] == [found.digest]


def test_the_config_of_a_url_is_replaced_and_not_written_over(tmp_path: Path) -> None:
    """An empty file, which whoever reads at the same time would see, is a config of defaults."""
    run = Run(f"file://{tmp_path}/storage", "demo", cache=tmp_path / "cache")
    run.write_config(RunConfig(seed=4))
    before = (run.root / "run.toml").stat().st_ino
    assert run.read_config().seed == 4
    assert (run.root / "run.toml").stat().st_ino != before
    assert [path.name for path in run.root.iterdir()] == ["run.toml"]


def test_a_relative_storage_is_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(Run("storage", "demo"))
    assert (tmp_path / "storage" / "demo" / "models" / "llm" / "manifest.json").is_file()
    monkeypatch.chdir(tmp_path / "storage")
    assert (Run(".", "demo").fetch("models/llm").path / "a.txt").read_text() == "one"
