"""Collaborative embeddings become K additive continuous tokens."""
