"""What Prometheus is told, and what a person is shown."""

from __future__ import annotations

import numpy as np
import pytest

from ctd_scale.serving.middleware import Record, Staged
from ctd_scale.serving.picture import flattened
from ctd_scale.serving.probe import Probe
from ctd_scale.serving.telemetry import Telemetry, cached


def test_requests_stages_and_known_preferences_are_counted() -> None:
    telemetry = Telemetry()
    cold, warm = {"preference": 0.2, "rank": 0.003}, {cached("preference"): 0.0, "text": 0.4, "rank": 0.003}
    records = [
        Record("1", "/v1/recommend", 200, 0.3, cold),
        Record("2", "/v1/recommend", 200, 0.02, warm),
        Record("3", "/v1/recommend", 504, 30.0),
        Staged({"rank": 0.7, cached("preference"): 0.0}),  # one of a batch
    ]
    telemetry.observe(records)
    assert 'version="v0"' in telemetry.text("v0", 0)
    lines = telemetry.text("v1", 0).splitlines()
    assert not any('version="v0"' in line for line in lines)
    for line in (
        'ctd_requests_total{route="/v1/recommend",status="200"} 2.0',
        'ctd_requests_total{route="/v1/recommend",status="504"} 1.0',
        'ctd_request_seconds_count{route="/v1/recommend"} 3.0',
        'ctd_stage_seconds_bucket{le="0.005",stage="rank"} 2.0',
        'ctd_stage_seconds_count{stage="preference"} 1.0',
        'ctd_preference_cache_total{outcome="hit"} 2.0',
        'ctd_preference_cache_total{outcome="miss"} 1.0',
        'ctd_text_cache_total{outcome="miss"} 1.0',
        'ctd_stage_seconds_count{stage="rank"} 3.0',
        'ctd_version_info{version="v1"} 1.0',
    ):
        assert line in lines
    assert not any("_cached" in line for line in lines if line.startswith("ctd_stage"))


def test_the_recall_is_that_of_the_version_served() -> None:
    telemetry = Telemetry()
    telemetry.observe([Probe("v0", 0.2), Probe("v1", 0.9), Probe("v1", 1.0)])
    lines = telemetry.text("v1", 0).splitlines()
    for line in (
        'ctd_index_recall_bucket{le="0.8",version="v1"} 0.0',
        'ctd_index_recall_bucket{le="0.9",version="v1"} 1.0',
        'ctd_index_recall_count{version="v1"} 2.0',
        'ctd_index_recall_sum{version="v1"} 1.9',
    ):
        assert line in lines
    assert 'version="v0"' not in telemetry.text("v1", 0)
    telemetry.observe([Probe("v0", 0.2)])  # a replica that has not followed yet
    assert 'version="v0"' not in telemetry.text("v1", 0)


@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_the_picture_keeps_the_two_largest_spreads(rows: int) -> None:
    random = np.random.default_rng(0)
    plane = random.standard_normal((rows, 2)) * [5.0, 2.0]
    turned = np.linalg.qr(random.standard_normal((6, 6)))[0]
    vectors = (np.hstack([plane, np.zeros((rows, 4))]) @ turned + 3).astype(np.float32)
    points = flattened(vectors)
    assert points.shape == (rows, 2)
    assert np.abs(points).max() <= 1
    # Distances in the plane are those between the vectors, but for one scale.
    apart, shown = (np.linalg.norm(each[:, None] - each[None], axis=2) for each in (plane, points))
    if rows > 1:
        scale = shown.max() / apart.max()
        assert np.allclose(shown, scale * apart, atol=1e-5)
        assert np.abs(points).max() == pytest.approx(1)
    assert np.array_equal(flattened(vectors), points)
