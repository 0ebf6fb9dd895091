"""Losses: pure functions of embeddings and a group; their gradients are averaged over ranks.

Letters of the shapes: n rows of this rank, N rows of all, d embedding size, W ranks, m x k a tile.
`trainer/objective.py` makes them a step's, by the `[loss]` table of the configuration.
"""

from trainer.losses.clip import clip_loss
from trainer.losses.multi_similarity import multi_similarity_loss
from trainer.losses.siglip import siglip_loss
from trainer.losses.supcon import supcon_loss

__all__ = ["clip_loss", "multi_similarity_loss", "siglip_loss", "supcon_loss"]
