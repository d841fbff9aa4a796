"""The user-item graph and its collaborative embeddings (LightGCN on sampled neighbourhoods)."""
