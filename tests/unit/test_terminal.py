"""How a command ends that is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ctd_scale import cli, terminal
from ctd_scale.terminal import ctrl_c_kept, take_sigterm_as_ctrl_c

LOST = """
import os, signal, time
from ctd_scale import terminal
terminal.ENDING_S = 0.5
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run in the background
with terminal.interruptible():
    try:
        os.kill(os.getpid(), signal.{name})
    except KeyboardInterrupt:
        print("lost", flush=True)
    time.sleep(60)
"""


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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_that_is_lost_ends_a_command_all_the_same(name: str) -> None:
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", LOST.format(name=name)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (terminal.INTERRUPTED, "lost\n")
    assert ended.stderr == f"{terminal.INTERRUPTION}\n"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("taken", [take_sigterm_as_ctrl_c, lambda: None])
def test_a_command_is_interrupted_from_its_beginning_and_gives_signals_back(
    taken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "ENDING_S", 3600.0)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:

        def work(*_: object, signal_number: signal.Signals = number, **__: object) -> None:
            taken()
            os.kill(os.getpid(), signal_number)

        monkeypatch.setattr(cli, "configured", work)
        with pytest.raises(SystemExit) as end:
            cli.main(["run", "-c", "debug"])
        assert end.value.code == cli.INTERRUPTED
    after = {number: signal.getsignal(number) for number in before}
    signal.signal(signal.SIGINT, ignored)
    assert after == before


def test_what_ray_makes_of_sigterm_while_it_starts_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        sys.exit(signal.SIGTERM)

    monkeypatch.setattr(cli, "configured", work)
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "-c", "debug"])
    assert end.value.code == cli.INTERRUPTED
    assert capsys.readouterr().err == f"{terminal.INTERRUPTION}\n"


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_is_an_interruption(
    ctrl_c: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "ENDING_S", 3600.0)
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
