"""Rank the withheld items and publish the table.

ray job submit -- python -m jobs.evaluate --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("evaluate")
