"""Recommend to every user of a finished run's log, into Parquet.

ray job submit -- python -m jobs.recommend_all --run URL --out URL
"""

import sys

from ctd_scale.cli import main

if __name__ == "__main__":
    main(["recommend-all", *sys.argv[1:]])
