"""Layers, stages, exit heads and weights: the model, which knows nothing of parallelism."""
