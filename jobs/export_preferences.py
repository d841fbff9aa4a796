"""Export every preference (and text) by Ray Data batch inference.

ray job submit -- python -m jobs.export_preferences --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("export_preferences")
