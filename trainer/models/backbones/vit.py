"""The vision transformers that insightface trains on faces, with its weights' parameter names.

As its `recognition/arcface_torch/backbones/vit.py` has them: patches of 9 pixels (12 x 12 of them
at 112, the last 4 pixels unseen), no class token, ReLU6, and an embedding layer over all patches in
place of pooling, because aligned faces have places. In training some patches are left out, and a
learned token stands for them at the end. Blocks are timm's.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from trainer.dropout import KeyedPatchMask
from trainer.models.recompute import recomputed

PATCH_SIZE, NUM_HEADS = 9, 8
STD = 0.02


class FaceViT(nn.Module):
    """(n, 3, H, W) normalised pixels -> (n, d)."""

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        embedding_dim: int,
        image_size: int,
        dropout: float,
        drop_path: float,
        patch_dropout: float,
        freeze_last_bn_scale: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        num_patches = (image_size // PATCH_SIZE) ** 2
        self.patch_embed = _PatchEmbed(width)
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token.requires_grad_(patch_dropout > 0)  # else no gradient would reach it
        self.mask = KeyedPatchMask(patch_dropout, layer=-1)
        self.blocks = nn.ModuleList(
            Block(
                width,
                NUM_HEADS,
                drop_path=drop_path * i / max(1, depth - 1),
                act_layer=nn.ReLU6,
                norm_layer=nn.LayerNorm,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feature = nn.Sequential(
            nn.Linear(num_patches * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, eps=2e-5),
        )
        self.feature[3].weight.requires_grad_(not freeze_last_bn_scale)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=STD)
        nn.init.normal_(self.mask_token, std=STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:  # (n, 3, H, W) -> (n, patches, width)
        """All patches; a left out one as the mask token."""
        x, kept = self.mask(self.patch_embed(x) + self.pos_embed)
        for block in self.blocks:
            x = recomputed(block, x) if self._recomputes() else block(x)
        x = self.norm(x)
        if kept is None:
            return x
        whole = self.mask_token.to(x.dtype).expand(len(x), self.pos_embed.shape[1], -1)
        return whole.scatter(1, kept[:, :, None].expand_as(x), x)

    def forward_head(self, x: Tensor) -> Tensor:  # (n, patches, width) -> (n, d)
        """Dropout, the layers over all patches and their norms."""
        return self.feature(self.dropout(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass."""
        self.grad_checkpointing = True

    def parameter_depths(self) -> dict[str, int]:
        """Group of each parameter: patches and positions 0, a block each, the last layers."""
        last = len(self.blocks) + 1

        def depth(name: str) -> int:
            if name.startswith("blocks."):
                return int(name.split(".")[1]) + 1
            return last if name.startswith(("norm.", "feature.", "mask_token")) else 0

        return {name: depth(name) for name, _ in self.named_parameters()}

    def _recomputes(self) -> bool:
        return self.grad_checkpointing and self.training and torch.is_grad_enabled()


class _PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_SIZE, PATCH_SIZE)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, H, W) -> (n, patches, width), row by row
        return self.proj(x).flatten(2).transpose(1, 2)
