"""Margins: what the loss makes of the cosines between embeddings and class centers.

One file a family. The target's cosine becomes a logit with an explicit slope, bounded at cosines of
1 and -1; nothing here is differentiated by autograd. Everything is a function of the global batch,
so every rank comes to the same answer on its own, without a collective.
"""

from trainer.centers.margins.build import build_margin
from trainer.centers.margins.margin import Margin, Margined, Targets

__all__ = ["Margin", "Margined", "Targets", "build_margin"]
