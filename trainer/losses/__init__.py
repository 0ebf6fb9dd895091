"""Losses: pure functions of embeddings and a group; their gradients are averaged over ranks.

Letters of the shapes: n rows of this rank, N rows of all, d embedding size, W ranks, m x k a tile.
`LOSSES[name](config.loss, wire)` builds the function of a step:
`loss(embeddings, scale, bias, batch, group)` -> () this rank's mean.
"""

from trainer.losses.build import build_clip, build_siglip
from trainer.losses.clip import clip_loss
from trainer.losses.multi_similarity import multi_similarity_loss
from trainer.losses.siglip import siglip_loss
from trainer.losses.supcon import supcon_loss

__all__ = ["LOSSES", "clip_loss", "multi_similarity_loss", "siglip_loss", "supcon_loss"]

LOSSES = {"clip": build_clip, "siglip": build_siglip}
