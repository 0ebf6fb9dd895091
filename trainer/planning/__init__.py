"""Planned batches while training: `Planning` is what the loop holds; read `planning.py` first."""

from trainer.planning.planning import Planning, clusters_of

__all__ = ["Planning", "clusters_of"]
