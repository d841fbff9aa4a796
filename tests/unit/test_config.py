"""Every mistake in a configuration is refused by name; what was accepted comes back from run.toml."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ctd_scale.artifacts import Run
from ctd_scale.config import ConfigError, LLMConfig, RunConfig, load_config, resolve_config, section_hash

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "jobs" / "configs").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_without_anything_the_defaults_hold() -> None:
    assert load_config() == RunConfig()


def test_a_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 5\n[llm]\nepochs = 3\nlearning_rate = 1e-3\n[graph]\nembed_dim = 8\n")
    overrides = [
        "llm.epochs=7",
        "llm.backbone=/models/llama = 1B",
        "graph.fanout=[3, 2]",
        "interactions.dataset=ml-100k",
        "llm.use_user_tokens=true",
        "resources.llm.num_workers=2",
        'llm.dtype="float32"',
    ]
    config = load_config(path, overrides)
    assert config.seed == 5
    assert (config.llm.epochs, config.llm.learning_rate, config.graph.embed_dim) == (7, 1e-3, 8)
    assert config.llm.backbone == "/models/llama = 1B", "a bare text needs no quotes"
    assert config.graph.fanout == (3, 2)
    assert config.interactions.dataset == "ml-100k"
    assert config.llm.use_user_tokens is True
    assert config.resources.llm.num_workers == 2
    assert config.llm.dtype == "float32"
    assert config.llm.max_history == LLMConfig().max_history


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[llm]\nepoch = 3\n", "llm.epoch: unknown key"),
        ("[llms]\nepochs = 3\n", "llms: unknown key"),
        ("[resources.llm]\nworkers = 3\n", "resources.llm.workers: unknown key"),
        ('[llm]\nepochs = "3"\n', "llm.epochs: Input should be a valid integer (got '3')"),
        ('[interactions]\nattribute_columns = ["price", "price"]\n', "'price' is empty, given twice or the name of"),
        ('[interactions]\nattribute_columns = ["title"]\n', "'title' is empty, given twice or the name of another"),
        ("[llm]\nepochs = 3.0\n", "llm.epochs: Input should be a valid integer"),
        ("[llm]\nepochs = 0\n", "llm.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("[llm]\nuse_user_tokens = 1\n", "llm.use_user_tokens: Input should be a valid boolean"),
        ("[tokenizer]\nmask_ratio = 1.5\n", "tokenizer.mask_ratio: Input should be less than or equal to 1"),
        ('[llm]\ndtype = "float16"\n', "llm.dtype: Input should be 'auto', 'bfloat16' or 'float32'"),
        ("[resources.llm]\nnum_workers = 2\ngpu_share = 0.5\n", "gpu_share=0.5 needs num_workers=1, got 2"),
        ('[graph]\nfanout = ["16", 8]\n', "graph.fanout.0: Input should be a valid integer"),
        ("[graph]\nnum_layers = 3\n", "graph.fanout=[16, 8] needs one positive number per layer; graph.num_layers=3"),
        ("[graph]\nfanout = [4, 0]\n", "graph.fanout=[4, 0] needs one positive number per layer"),
        (
            '[llm]\nitem_vectors = "collaborative"\npreference_dim = 32\n',
            "llm.preference_dim=32 but graph.embed_dim=64",
        ),
    ],
)
def test_a_mistake_is_named_with_its_path(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(f"{path}: 1 problem(s)")


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "seed = -1\nsead = 3\n[llm]\nepochs = 0\n"))
    message = str(caught.value)
    assert "3 problem(s)" in message
    assert all(name in message for name in ("\n  seed:", "\n  sead:", "\n  llm.epochs:"))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("llm.epochs", "must be stage.key=value"),
        ("=3", "must be stage.key=value"),
        ("llm.epoch=3", r"llm\.epoch: unknown key"),
        ("llm.epochs=three", r"llm\.epochs: Input should be a valid integer \(got 'three'\)"),
        ("seed.low=3", r"seed: Input should be a valid integer"),
    ],
)
def test_a_malformed_override_is_refused(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(overrides=[override])


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is a value, not a section"):
        load_config(overrides=["seed=1", "seed.low=3"])


@pytest.mark.parametrize("content", [b"[llm\n", b"epochs = \n", b"a = '\xff'\n"])
def test_what_is_no_toml_is_refused_by_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(path)


def test_a_missing_config_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"'nowhere' is neither a file nor a shipped config; shipped: .*debug"):
        load_config("nowhere")
    with pytest.raises(ConfigError, match=r"'nowhere/ml100k\.toml' is neither a file nor a shipped config"):
        load_config("nowhere/ml100k.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_found_by_name(path: Path) -> None:
    assert load_config(path.stem) == load_config(path)
    assert resolve_config(f"{path.stem}.toml").read_text() == path.read_text()


def test_there_are_shipped_configs() -> None:
    assert {"debug", "quickstart"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("name", ["defaults", *(path.stem for path in SHIPPED)])
def test_a_frozen_run_gives_the_same_config(tmp_path: Path, name: str) -> None:
    config = RunConfig() if name == "defaults" else load_config(name)
    run = Run(str(tmp_path), "some")
    run.write_config(config)
    assert run.read_config() == config
    assert load_config(tmp_path / "some" / "run.toml") == config


def test_odd_values_survive_the_round_trip(tmp_path: Path) -> None:
    overrides = [
        "llm.learning_rate=1e-7",
        'interactions.items="C:\\\\new \\"x\\".csv"',
        "graph.l2=0",
        "diffusion.guidance=3",
    ]
    config = load_config(overrides=overrides)
    assert config.interactions.items == 'C:\\new "x".csv'
    run = Run(str(tmp_path), "some")
    run.write_config(config)
    assert run.read_config() == config


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().llm.epochs = 3  # type: ignore[misc]


def test_a_hash_follows_its_sections_and_the_seed() -> None:
    base = section_hash(RunConfig(), ["graph", "llm"])
    assert section_hash(RunConfig(), ["graph", "llm"]) == base
    assert (
        section_hash(load_config(overrides=["diffusion.epochs=3", "resources.llm.num_workers=2"]), ["graph", "llm"])
        == base
    )
    for override in ("llm.epochs=77", "graph.l2=0.5", "seed=1"):
        assert section_hash(load_config(overrides=[override]), ["graph", "llm"]) != base
    assert section_hash(RunConfig(), ["graph"]) != base


def test_tokens_that_the_chain_cannot_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"llm\.item_tokens='none' is for the baselines"):
        load_config(overrides=["llm.item_tokens=none"])
