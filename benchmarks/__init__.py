"""One benchmark a stage, each against a named rival.

`python -m benchmarks.bench_NAME --size small|full --json PATH`
"""
