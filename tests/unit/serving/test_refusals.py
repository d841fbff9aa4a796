"""Why a version is not served, in one line."""

from __future__ import annotations

from ctd_scale.serving.deployments import MAX_SAID, _in_short


def test_an_error_is_one_line_with_its_end() -> None:
    assert _in_short(RuntimeError("Error(s) in loading:\n\tsize mismatch")) == (
        "RuntimeError: Error(s) in loading: size mismatch"
    )
    said = _in_short(OSError("Traceback " + "x" * 2 * MAX_SAID + "\nno such file"))
    assert said.startswith("OSError: ... xxx")
    assert said.endswith(" no such file")
    assert len(said) == len("OSError: ... ") + MAX_SAID
