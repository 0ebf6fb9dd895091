"""Towers: `architecture.py` finds a model, `build.py` builds it, `towers.py` is what trains.

`layers.py` says how deep a parameter sits, `initialise.py` is big_vision's start. Loss and
optimizer live elsewhere; a new architecture is a JSON file, not code.
"""

from trainer.models.build import build_model
from trainer.models.towers import Embeddings, TwoTower

__all__ = ["Embeddings", "TwoTower", "build_model"]
