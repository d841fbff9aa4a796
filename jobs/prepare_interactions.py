"""Read, check, split and index a log.

ray job submit -- python -m jobs.prepare_interactions --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("prepare_interactions")
