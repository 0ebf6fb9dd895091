"""Losses: pure functions of embeddings and a group; their gradients are averaged over ranks.

Letters of the shapes: n rows of this rank, N rows of all, d embedding size, W ranks, m x k a tile;
of queries against labels: m label rows of this rank, L labels of all, p positives of this rank.
`trainer/objectives` makes them a step's, by the `[loss]` table of the configuration.
"""

from trainer.losses.clip import clip_loss
from trainer.losses.decoupled import decoupled_loss
from trainer.losses.info_nce import info_nce_loss
from trainer.losses.listed import Positives
from trainer.losses.multi_similarity import multi_similarity_loss
from trainer.losses.one_vs_all import one_vs_all_loss
from trainer.losses.siglip import siglip_loss
from trainer.losses.soft_topk import soft_topk_loss
from trainer.losses.supcon import supcon_loss
from trainer.losses.topk_hinge import topk_hinge_loss

__all__ = [
    "Positives",
    "clip_loss",
    "decoupled_loss",
    "info_nce_loss",
    "multi_similarity_loss",
    "one_vs_all_loss",
    "siglip_loss",
    "soft_topk_loss",
    "supcon_loss",
    "topk_hinge_loss",
]
