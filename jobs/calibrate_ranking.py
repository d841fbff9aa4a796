"""Choose the fusion weights on validation.

ray job submit -- python -m jobs.calibrate_ranking --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("calibrate_ranking")
