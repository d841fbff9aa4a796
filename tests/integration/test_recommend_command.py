"""What `ctd recommend` lets through, over the tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import make_tiny_run

from ctd_scale.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("command")).root


def recommended(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> set[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["recommend", "--run", str(run), "--history", "i3,i1", "--k", "40", "--json", *options])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    return {item["item_id"] for item in json.loads(told.out)["items"]}


def test_numbers_and_named_items_say_what_may_come_back(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = {f"i{item}" for item in range(40)} - {"i3", "i1"}
    # Half of an item's number is its price; every fifth has none.
    priced = {f"i{item}" for item in range(4, 17) if item % 5}
    assert recommended(run, capsys) == everything
    assert recommended(run, capsys, "--range", "price=2:8") == priced
    dear = {f"i{item}" for item in range(16, 40) if item % 5}
    assert recommended(run, capsys, "--range", "price=8:", "--exclude-item", "i17") == dear - {"i17"}
    assert recommended(run, capsys, "--only-item", "i9", "--only-item", "i20") == {"i9", "i20"}
    assert recommended(run, capsys, "--only-item", "i9", "--only-item", "i20", "--range", "price=0:99") == {"i9"}
    with pytest.raises(SystemExit) as ended:
        main(["recommend", "--run", str(run), "--history", "i3", "--range", "prize=2:8"])
    assert ended.value.code == 2
    assert "ranges: items have no number 'prize' (they have: 'price')" in capsys.readouterr().err
