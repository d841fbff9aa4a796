import ray, numpy as np


def test_ray(ray_session):
    import ray.data

    assert ray.data.range(10).map_batches(lambda b: {"id": b["id"] * 2}).sum("id") == 90
