"""Train LightGCN on streamed subgraphs and publish the graph and its embeddings.

ray job submit -- python -m jobs.train_graph --config C --storage URL --name RUN
"""

from ctd_scale.cli import run_job

if __name__ == "__main__":
    run_job("train_graph")
