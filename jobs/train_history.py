"""Train what reads the vectors of a history's items, and these, before the LLM is there.

ray job submit -- python -m jobs.train_history --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("train_history")
