"""The `[model]` section; the other sections are in `trainer/sections.py`."""

from typing import Literal

from pydantic import Field

from data.config import Section


class ModelConfig(Section):
    """The towers, or a face backbone: the architecture, its start weights, what is frozen."""

    name: str = "ViT-B-32"
    """An open_clip model name, or the path of an open_clip JSON config. For texts and labels: bag,
    transformer, open_clip:NAME (its text tower), hf:FOLDER. For losses against class
    centers: iresnet18, 34, 50, 100, 200, resnet10, mobilefacenet, vit_t, s, b, l, h, timm:NAME."""
    pretrained: str = ""
    """Start weights: a local checkpoint, an open_clip tag, or `hf-hub:...`; empty: from scratch.
    Face backbones: a file of insightface's or of our own names."""
    width: int = Field(default=64, ge=1)
    """Face backbones resnet10, 18, 34: channels of the first stage; each later one has twice.
    Text towers bag and transformer: size of a token's vector."""
    embedding_dim: int = Field(default=512, ge=2)
    """Face backbones and text towers: size of an embedding."""
    layers: int = Field(default=2, ge=0)
    """Text towers: layers of the transformer, hidden layers after a bag."""
    heads: int = Field(default=4, ge=1)
    """Text towers: attention heads of the transformer."""
    context_length: int = Field(default=32, ge=1)
    """Text towers bag and transformer: tokens of a text."""
    buckets: int = Field(default=1 << 16, ge=2)
    """Text towers bag and transformer: rows of the table that words are hashed into."""
    ngrams: int = Field(default=1, ge=1, le=2)
    """Text tower bag: 2 takes pairs of words too."""
    skip: int = Field(default=0, ge=0)
    """Text tower bag: words that may stand between a pair's."""
    placed_words: int = Field(default=0, ge=0)
    """Text tower bag: first words that count once more, as words of their place."""
    shared_towers: bool = True
    """Texts and labels are embedded by one text tower, or by two."""
    image_size: int = Field(default=0, ge=0)
    """Face backbones: pixels of a side; 0: 112, or what the timm model was made for."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Face backbones: dropout before the last layer. Text towers: of what each layer adds."""
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Text tower bag: share of a text's tokens left out."""
    label_dropout: bool = True
    """Text towers: labels' texts lose tokens and features too, not queries' alone."""
    token_weights: bool = False
    """Text tower bag: a learned weight for each token; false: the plain mean."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Face backbones, transformers and timm's: stochastic depth."""
    fp32_head: bool = True
    """Face backbones: the last layer and its norm in float32 under autocast."""
    freeze_last_bn_scale: bool = True
    """Face backbones: the last batch norm's scale stays 1, as published."""
    bn_neck: bool = True
    """Face backbones of timm: a batch norm after the last layer, as the others have it."""
    global_batch_norm: bool = True
    """Batch norms normalise by all ranks' samples: the same run, to rounding, at any number of
    ranks, for an exchange a layer each way. With `train.chunk_size` by the ranks' present chunks,
    which another number of ranks cuts differently."""
    init: Literal["open_clip", "big_vision", "positional"] = "open_clip"
    """Initialisation of the towers; positional: open_clip's, but each head of a ResNet's attention
    pooling starts at one position, which keeps the layout of aligned images."""
    init_scale: float = Field(default=0.0, ge=0)
    """Start of the cosines' multiplier; 0: the loss's published value (1/0.07, SigLIP 10)."""
    init_bias: float = -10.0
    """Start of SigLIP's additive bias."""
    max_scale: float = Field(default=100.0, ge=1)
    """The scale is clamped to [1, max_scale] after each step; `inf` leaves it free (big_vision)."""
    lock_image: bool = False
    """Freeze the image tower (LiT)."""
    lock_image_unlocked_groups: int = Field(default=0, ge=0)
    """Last groups of the image tower that stay trainable when it is locked."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = Field(default=0, ge=0)
    """Last layers of the text tower that stay trainable when it is locked."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of image patches dropped in training (ViT only)."""
    compile: bool = False
    """torch.compile both towers, or the face backbone."""
