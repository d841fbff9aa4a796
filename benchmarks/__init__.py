"""One benchmark a stage, each against a named rival.

`python -m benchmarks.bench_NAME --size small|full --json PATH`
"""

from ctd_scale import environment

# As for Ray's workers, for ours and rivals alike.
environment.set_defaults()
