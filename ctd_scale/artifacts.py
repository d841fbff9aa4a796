"""Publish and read artifacts: a folder of files whose `manifest.json` is written last.

An artifact without a manifest is not published. The manifest holds a sha256 of every file, the hash of the
configuration and the digests of the artifacts that it was made from, so that a stage whose inputs did not change
is skipped, and an artifact made from something else is refused.

`storage` is a local folder or any fsspec URL. Remote artifacts are read through a local cache, verified.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import tomli_w

from ctd_scale import __version__
from ctd_scale.config import RunConfig, load_config
from ctd_scale.environment import cache_folder, git_revision

MANIFEST = "manifest.json"
MANIFEST_KEYS = ("digest", "config_hash", "inputs", "facts", "files")
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # as of some network mounts
SCHEMA_VERSION = 2

# Which command makes which artifact: every refusal names it.
MAKERS = {
    "interactions": "prepare_interactions",
    "graph": "train_graph",
    "embeddings": "train_graph",
    "embeddings_at_test": "train_graph",
    "models/tokenizer": "train_tokenizer",
    "tokens": "train_tokenizer",
    "models/history": "train_history",
    "models/llm": "train_llm",
    "preferences": "export_preferences",
    "models/diffusion": "train_diffusion",
    "index": "build_index",
    "ranking": "calibrate_ranking",
    "metrics": "evaluate",
}
# What no stage makes, and the command that does.
COMMANDS = {"latency": "ctd bench latency"}
RIVALS = ("codes/", "baselines/", "ranks/")
# The locks that this process has.
_held: set[Path] = set()


class ArtifactError(ValueError):
    """An artifact is missing, damaged or made from something else."""


@dataclass(frozen=True)
class Artifact:
    """A published, verified folder."""

    name: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Identity of the content (hex sha256 over the files' digests)."""
        return str(self.manifest["digest"])


@dataclass(frozen=True)
class Run:
    """`{storage}/{name}`: where one run's artifacts, checkpoints and logs lie."""

    storage: str
    name: str
    cache: Path = field(default_factory=lambda: cache_folder() / "artifacts")
    # By name, what shapes the artifacts that are published: each manifest says it.
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run, by its folder or URL. Raises ArtifactError where there is none."""
        storage, slash, name = str(path).rstrip("/").rpartition("/")
        run = cls(storage or slash or ".", name)
        if not run.exists("run.toml"):
            raise ArtifactError(
                f"no run at {path}: {path}/run.toml does not exist; `ctd run --storage DIR --name RUN` makes one"
            )
        return run

    def __post_init__(self) -> None:
        if not self.storage:
            raise ArtifactError("the storage of runs is empty, as of a variable that is not set; give --storage DIR")

    @property
    def url(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def is_local(self) -> bool:
        return "://" not in self.storage

    @property
    def root(self) -> Path:
        """Local folder of the run; for a remote run, its local scratch (logs, staging)."""
        if self.is_local:
            return Path(self.url).absolute()
        return self.cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> str:
        """Where Ray Train keeps resumable checkpoints (path or URL)."""
        return str(self.root / "checkpoints") if self.is_local else f"{self.url}/checkpoints"

    def exists(self, relative: str) -> bool:
        if self.is_local:
            return (self.root / relative).exists()
        filesystem, base = fsspec.url_to_fs(self.url)
        return bool(filesystem.exists(f"{base}/{relative}"))

    def write_config(self, config: RunConfig) -> None:
        """Freeze the config, defaults included, as run.toml."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.write_file("run.toml", tomli_w.dumps(config.model_dump(mode="json")))

    def read_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The frozen config, with overrides on top."""
        local = self.root / "run.toml"
        if not self.is_local:
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(local, self.read_file("run.toml"))
        return load_config(local, overrides)

    def read_file(self, relative: str) -> str:
        """A small file of the run, wherever it lies."""
        if self.is_local:
            return (self.root / relative).read_text(encoding="utf-8")
        filesystem, base = fsspec.url_to_fs(self.url)
        return bytes(filesystem.cat_file(f"{base}/{relative}")).decode()

    def write_file(self, relative: str, text: str) -> None:
        """Write a small file of the run, so that a reader sees the old or the new one."""
        local = self.root / relative
        local.parent.mkdir(parents=True, exist_ok=True)
        write_text(local, text)
        if not self.is_local:
            filesystem, base = fsspec.url_to_fs(f"{self.url}/{relative}")
            filesystem.makedirs(base.rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(base, text.encode())

    # -- reading ---------------------------------------------------------------------------------------------

    def manifest(self, name: str) -> Mapping[str, Any] | None:
        """The manifest of a published artifact, or None."""
        if not self.exists(f"{name}/{MANIFEST}"):
            return None
        try:
            manifest: dict[str, Any] = json.loads(self.read_file(f"{name}/{MANIFEST}"))
        except ValueError as error:
            raise ArtifactError(f"{self.url}/{name}/{MANIFEST} is not JSON ({error}); {_rerun(name)}") from None
        if not isinstance(manifest, dict):
            raise ArtifactError(f"{self.url}/{name}/{MANIFEST} is no JSON object; {_rerun(name)}")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise ArtifactError(
                f"{self.url}/{name} has schema version {manifest.get('schema_version')}, this is ctd-scale "
                f"{__version__} with schema version {SCHEMA_VERSION}; {_rerun(name)}"
            )
        if missing := [key for key in MANIFEST_KEYS if key not in manifest]:
            raise ArtifactError(f"{self.url}/{name}/{MANIFEST} has no {missing[0]!r}; {_rerun(name)}")
        return manifest

    def fetch(self, name: str, *, verify: bool = True) -> Artifact:
        """A published artifact as a local folder, every file checked against its digest.

        Raises ArtifactError: not published, or a file differs from what was published.
        """
        manifest = self.manifest(name)
        if manifest is None:
            raise ArtifactError(f"{self.url}/{name} is not published; {_rerun(name)}")
        path = self.root / name if self.is_local else self._download(name, manifest)
        fault = _fault(path, manifest["files"]) if verify else ""
        if fault and not self.is_local:  # perhaps of the cache alone
            shutil.rmtree(path, ignore_errors=True)
            fault = _fault(self._download(name, manifest), manifest["files"])
        if fault:
            raise ArtifactError(f"{fault}; {_rerun(name)}")
        return Artifact(name, path, manifest)

    def require_made_from(self, artifact: Artifact, *inputs: Artifact) -> None:
        """Refuse an artifact that was made from other inputs than these."""
        for given in inputs:
            expected = artifact.manifest["inputs"].get(given.name)
            if expected is not None and expected != given.digest:
                raise ArtifactError(
                    f"{self.url}/{artifact.name} was made from another {given.name} (digest {expected[:12]}..., "
                    f"found {given.digest[:12]}...); {_rerun(artifact.name)}"
                )

    def _download(self, name: str, manifest: Mapping[str, Any]) -> Path:
        target = self.cache / str(manifest["digest"])
        if not (target / MANIFEST).exists():
            filesystem, base = fsspec.url_to_fs(self.url)
            aside = self.cache / f".{manifest['digest']}-{uuid.uuid4().hex[:8]}"
            try:
                for file in (*manifest["files"], MANIFEST):
                    (aside / file).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        filesystem.get_file(f"{base}/{name}/{file}", str(aside / file))
                    except FileNotFoundError:
                        raise ArtifactError(f"{self.url}/{name}/{file} is missing; {_rerun(name)}") from None
                with suppress(OSError):  # another process was faster, and others may read what it has put there
                    aside.rename(target)
                if not (target / MANIFEST).exists():  # something was removed of what is there
                    _replace_folder(aside, target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return target

    # -- writing ---------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else on this machine makes anything of the run meanwhile; whoever has it may take it again. Where the
        file system has no locks, nobody is kept out.

        Raises ArtifactError at once where another process has it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / LOCK
        if path in _held:
            yield
            return
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ArtifactError(
                    f"{self.url} is being made by another process ({lock.read().strip()}); wait until it has ended, or "
                    "give another --name"
                ) from None
            except OSError as error:  # better unguarded than not at all
                if error.errno not in NO_LOCKS:
                    raise
            lock.truncate(0)
            lock.write(f"pid {os.getpid()}")
            lock.flush()
            _held.add(path)
            try:
                yield
            finally:
                _held.discard(path)

    @contextmanager
    def publish(
        self,
        name: str,
        *,
        config_hash: str,
        inputs: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
    ) -> Iterator[Path]:
        """Write an artifact: yields a staging folder; on leaving without an error it is published whole.

        `inputs` maps artifact name to digest; `facts` (rows, shapes, ...) may be filled until the block is left.
        """
        staging = self.root / ".staging" / f"{name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        try:
            yield staging
            files = {
                str(path.relative_to(staging)): {"sha256": file_digest(path), "bytes": path.stat().st_size}
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            }
            digest = hashlib.sha256(
                json.dumps({file: entry["sha256"] for file, entry in files.items()}, sort_keys=True).encode()
            ).hexdigest()
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "ctd_scale": __version__,
                "artifact": name,
                "digest": digest,
                "config_hash": config_hash,
                "settings": dict(self.settings),
                "inputs": dict(inputs),
                "facts": dict(facts or {}),
                "git_revision": git_revision(),
                "files": files,
            }
            for path in staging.rglob("*"):
                if path.is_file():
                    _fsync(path)
            write_text(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            if self.is_local:
                _replace_folder(staging, self.root / name)
            else:
                self._upload(staging, name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _upload(self, staging: Path, name: str) -> None:
        filesystem, base = fsspec.url_to_fs(self.url)
        if filesystem.exists(f"{base}/{name}/{MANIFEST}"):
            filesystem.rm_file(f"{base}/{name}/{MANIFEST}")  # it goes first: what follows is not published
        if filesystem.exists(f"{base}/{name}"):
            filesystem.rm(f"{base}/{name}", recursive=True)
        files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != MANIFEST)
        for path in [*files, staging / MANIFEST]:  # the manifest goes last: without it nothing is published
            target = f"{base}/{name}/{path.relative_to(staging)}"
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(path), target)


def link_artifact(name: str, source: Run, target: Run) -> None:
    """Publish what `source` has in `target`, too, by hard links instead of a copy: published files are never written
    to. Both must be local and on one file system."""
    aside = target.root / ".staging" / f"{name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
    try:
        shutil.copytree(source.root / name, aside, copy_function=os.link)
        _replace_folder(aside, target.root / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while chunk := file.read(1 << 22):
            sha.update(chunk)
        return sha.hexdigest()


def put_file(filesystem: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file of any file system so that its name stands for all of it."""
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}"
    filesystem.pipe_file(aside, data)
    filesystem.mv(aside, path)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    aside.write_text(text, encoding="utf-8")
    _fsync(aside)
    aside.replace(path)


def _replace_folder(source: Path, target: Path) -> None:
    """Put a finished folder in place; a kill in between leaves either none or a whole one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = target.with_name(f".{target.name}-old-{uuid.uuid4().hex[:8]}")
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.rename(target)
    _fsync(target.parent)


def _fault(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The first file that is not what was published, in words; '' where all are."""
    for file, entry in files.items():
        if not (folder / file).is_file():
            return f"{folder / file} is missing"
        if (got := file_digest(folder / file)) != entry["sha256"]:
            expected = f"{got[:12]}..., expected {entry['sha256'][:12]}..."
            return f"{folder / file} was changed after it was published: sha256 is {expected}"
    return ""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rerun(name: str) -> str:
    if name.startswith("changes/"):
        return "go back to an earlier version with `ctd index rollback --to N`"
    if name.startswith(RIVALS):
        return f"run `ctd bench quality` with {name.partition('/')[2]} again"
    return f"run `{COMMANDS[name]}`" if name in COMMANDS else f"rerun {MAKERS.get(name, name)} (`ctd run` does it)"
