"""TwoTower: an open_clip model as the trainer calls it, from uint8 pixels and tokens to unit rows.

The weights keep open_clip's names under `clip.`; `log_scale` and `bias` belong to the loss and
stand beside them with shape [1], because a parameter without a dimension crashes DeepSpeed.
"""

import math
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.augment import ResizeMode
from data.text import TokenizerSpec
from trainer.models.architecture import Architecture, Preprocess
from trainer.models.pixels import normalise_pixels


class Embeddings(NamedTuple):
    """What a loss needs of a batch; a tuple, so that DeepSpeed's hooks see its tensors."""

    images: Tensor | None
    """(n, d) float32 unit rows, or None where no images were given."""
    texts: Tensor | None
    """(n, d) float32 unit rows, or None where no texts were given."""
    scale: Tensor
    """(1,) multiplier of the cosines: exp(log_scale)."""
    bias: Tensor | None
    """(1,) SigLIP's additive term; None for losses without one."""

    def detach(self) -> "Embeddings":
        """The same values, cut from the graph."""
        images, texts, bias = (
            None if tensor is None else tensor.detach()
            for tensor in (self.images, self.texts, self.bias)
        )
        return Embeddings(images, texts, self.scale.detach(), bias)


class TwoTower(nn.Module):
    """Image and text tower of an open_clip model, with the scale and bias of the loss."""

    clip: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    log_scale: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        clip: Any,
        architecture: Architecture,
        *,
        max_scale: float,
    ) -> None:
        """Take `clip` over; its `logit_scale` and `logit_bias`, shape [1], become ours."""
        super().__init__()
        self.log_scale, self.bias = clip.logit_scale, clip.logit_bias
        clip.register_parameter("logit_scale", None)
        clip.register_parameter("logit_bias", None)
        self.clip = clip
        self.architecture = architecture
        self.max_scale = max_scale

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that `forward` takes."""
        size = self.clip.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def context_length(self) -> int:
        """Tokens of a text."""
        return self.tokenizer_spec.context_length

    @property
    def embed_dim(self) -> int:
        """Size d of an embedding."""
        return int(self.architecture.model_cfg["embed_dim"])

    @property
    def preprocess(self) -> Preprocess:
        """How images are resized before and normalised inside `forward`."""
        return self.architecture.preprocess

    @property
    def tokenizer_spec(self) -> TokenizerSpec:
        """What `data.text.build_tokenizer` makes this model's tokens from."""
        return self.architecture.tokenizer_spec

    @property
    def resize_mode(self) -> ResizeMode:
        """How an evaluation image is brought to `image_size`: shortest, longest or squash."""
        return self.preprocess.resize_mode

    def forward(
        self,
        images: Tensor | None = None,  # (n, 3, H, W) uint8
        texts: Tensor | None = None,  # (n, T) tokens
    ) -> Embeddings:
        """Embed either or both sides; rows are normalised in float32 whatever the towers use."""
        image_rows = text_rows = None
        if images is not None:
            image_rows = self.clip.encode_image(self._normalise(images), normalize=False)
            image_rows = F.normalize(image_rows.float(), dim=-1)
        if texts is not None:
            text_rows = self.clip.encode_text(texts, normalize=False)
            text_rows = F.normalize(text_rows.float(), dim=-1)
        return Embeddings(image_rows, text_rows, self.log_scale.exp(), self.bias)

    def _normalise(self, images: Tensor) -> Tensor:  # (n, 3, H, W) uint8 -> same shape, float
        dtype = next(self.clip.visual.parameters()).dtype
        return normalise_pixels(images, self.preprocess.mean, self.preprocess.std, dtype)

    def train(self, mode: bool = True) -> "TwoTower":  # noqa: FBT001 - torch's signature
        """As torch's; batch norms of a frozen tower stay in evaluation, or they would move."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not any(
                parameter.requires_grad for parameter in module.parameters()
            ):
                module.eval()
        return self

    @property
    def log_scale_limits(self) -> tuple[float, float]:
        """Limits of `log_scale` after a step; infinite both ways when `max_scale` is `inf`."""
        if math.isinf(self.max_scale):
            return -math.inf, math.inf
        return 0.0, math.log(self.max_scale)
