"""All stages in order.

ray job submit -- python -m jobs.pipeline --config C --storage URL --name RUN
"""

import sys

from ctd_scale.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
