"""FaceModel: one backbone as the trainer calls it, from uint8 pixels to rows for class centers.

The weights keep their published names under `backbone.`; the centers live in `trainer/centers`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

from data.augment import ResizeMode
from trainer.config import ConfigError, ModelConfig
from trainer.models.backbones import build_backbone
from trainer.models.pixels import normalise_pixels
from trainer.models.weights import load_backbone

MEAN = STD = (0.5, 0.5, 0.5)  # the peers': (x / 255 - 0.5) / 0.5, RGB


class FaceEmbeddings(NamedTuple):
    """What a loss against class centers needs of a batch; a tuple for DeepSpeed's hooks."""

    rows: Tensor
    """(n, d) float32, of any length: losses read the length before they normalise."""

    def detach(self) -> "FaceEmbeddings":
        """The same values, cut from the graph."""
        return FaceEmbeddings(self.rows.detach())


class FaceModel(nn.Module):
    """A backbone with the pixels' normalisation before it and its last layer's precision."""

    backbone: Any  # of trainer/models/backbones

    def __init__(
        self, backbone: nn.Module, *, image_size: tuple[int, int], embed_dim: int, fp32_head: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = image_size
        self.embed_dim = embed_dim
        self.fp32_head = fp32_head

    @property
    def resize_mode(self) -> ResizeMode:
        """How an evaluation image is brought to `image_size`: aligned faces fill the frame."""
        return "squash"

    @property
    def tokenizer_spec(self) -> None:
        """There are no texts."""
        return None

    def forward(self, images: Tensor) -> FaceEmbeddings:  # (n, 3, H, W) uint8
        """Embed; at least the rows are float32 whatever the backbone computes in."""
        if self.training and len(images) == 1 and self._has_own_norms():
            raise ConfigError(
                "a batch norm cannot train on a single image: start fewer ranks, or raise"
                " train.global_batch_size or train.chunk_size"
            )
        dtype = next(self.backbone.parameters()).dtype
        return FaceEmbeddings(self.embed_pixels(normalise_pixels(images, MEAN, STD, dtype)))

    def _has_own_norms(self) -> bool:
        """True if a batch norm sees this rank's rows alone (`trainer/models/batch_norm.py`)."""
        return any(type(module) is nn.BatchNorm1d for module in self.modules())

    def embed_pixels(self, pixels: Tensor) -> Tensor:  # (n, 3, H, W) normalised -> (n, d)
        """Rows of pixels that are normalised already."""
        features = self.backbone.forward_features(pixels)
        if not self.fp32_head or not is_autocast_available(pixels.device.type):
            return _at_least_float32(self.backbone.forward_head(features))
        with torch.autocast(pixels.device.type, enabled=False):
            rows: Tensor = self.backbone.forward_head(_at_least_float32(features))
        return rows


def build_face_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    load_weights: bool = True,
) -> FaceModel:
    """Build in float32, a pure function of `config` and `seed`, in training mode.

    Drawn on the CPU and then moved, so that every device starts from the same numbers; on "meta"
    nothing is drawn. `load_weights=False` leaves `config.pretrained` aside, for a caller that
    loads a checkpoint next. Raises ConfigError for what cannot be built, saying why.
    """
    _check_options(config)
    on_meta = torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU one alone
        backbone, image_size = build_backbone(config)
    model = FaceModel(
        backbone,
        image_size=image_size,
        embed_dim=config.embedding_dim,
        fp32_head=config.fp32_head,
    )
    if config.pretrained and load_weights and not on_meta:
        load_backbone(model.backbone, config)
    model = model.to(device)
    if config.grad_checkpointing:
        model.backbone.set_grad_checkpointing()
    if config.compile:
        model.backbone.forward_features = torch.compile(model.backbone.forward_features)
    return model.train()


def _check_options(config: ModelConfig) -> None:
    """Options of image and text towers, and a pair that torch cannot trace."""
    towers = ("lock_image", "lock_text", "init_scale")
    for option in towers:
        if getattr(config, option):
            raise ConfigError(f"model.{option} is for image and text towers, not {config.name}")
    if config.init != "open_clip":
        raise ConfigError(f"model.init = {config.init!r} is for towers; face backbones have theirs")
    if config.grad_checkpointing and config.compile:
        raise ConfigError(
            "model.compile decides itself what to recompute: set grad_checkpointing or compile"
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
