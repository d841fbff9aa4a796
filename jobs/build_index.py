"""Build the dense and text index.

ray job submit -- python -m jobs.build_index --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("build_index")
