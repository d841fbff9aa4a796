"""One benchmark a stage, each against a named rival.

`python -m benchmarks.bench_NAME --size small|full --json PATH`
"""

import os

# As for Ray's workers: large pages for fresh memory, for ours and rivals alike. Torch reads it when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
