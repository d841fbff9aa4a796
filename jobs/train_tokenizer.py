"""Train the K-way tokenizers and publish continuous tokens.

ray job submit -- python -m jobs.train_tokenizer --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("train_tokenizer")
