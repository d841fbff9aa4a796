"""How a command ends that is interrupted."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ctd_scale import cli
from ctd_scale.terminal import ctrl_c_kept, take_sigterm_as_ctrl_c


def test_who_takes_ctrl_c_gives_it_back() -> None:
    before = signal.getsignal(signal.SIGINT)

    def leave(*_: object) -> None:
        raise SystemExit(0)

    @ctrl_c_kept()
    def work() -> None:
        signal.signal(signal.SIGINT, leave)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit):
        pool.submit(ctrl_c_kept()(sys.exit)).result()


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_is_an_interruption(
    ctrl_c: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, ctrl_c)

    def work(*_: object, **__: object) -> None:
        take_sigterm_as_ctrl_c()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cli, "configured", work)
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "-c", "debug"])
    for number, handler in before.items():
        signal.signal(number, handler)
    assert end.value.code == cli.INTERRUPTED
    said = capsys.readouterr().err
    assert said == "interrupted; what is finished stays, and the same command goes on from there\n"


@pytest.mark.parametrize("said", ["[Errno 28] No space left on device", "llm failed: OSError: No space left on device"])
def test_a_full_disk_is_said_to_be_full(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise cli.TrainingError(said)

    monkeypatch.setattr(cli, "configured", fail)
    with pytest.raises(SystemExit):
        cli.main(["run", "-c", "debug"])
    assert capsys.readouterr().err.endswith(
        "; free some space and give the same command again: what is published stays\n"
    )
