"""Serve a finished run.

ray job submit -- python -m jobs.serve --run URL --host 0.0.0.0
"""

import sys

from ctd_scale.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
