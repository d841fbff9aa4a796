"""Fine-tune the preference LLM with DeepSpeed ZeRO.

ray job submit -- python -m jobs.train_llm --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("train_llm")
