"""Initialisations other than open_clip's: big_vision's transformers, positional pooling.

Source of the first: google-research/big_vision, `models/vit.py` and
`models/proj/image_text/text_transformer.py`. Two departures: layers that flax leaves at its
default (patches, heads) get that default, LeCun normal; and no head starts at zero, because an
embedding of length zero has no direction.
"""

import math

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

_POSITIONS = ("positional_embedding", "pos_embed")
_CLASS_TOKENS = ("class_embedding", "cls_token", "cls_emb", "reg_token")
_PROBES = ("latent", "query", "probe")
_PROJECTIONS = ("proj", "text_projection")
_HEADS = ("text_projection", "head.proj")
_MLP = ("c_fc", "c_proj", "fc1", "fc2")


@torch.no_grad()
def initialise_big_vision(clip: nn.Module) -> None:
    """Draw the weights of both towers anew, from torch's global generator, in place."""
    for name, module in clip.named_modules():
        _initialise_layer(name, module)
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:  # fixed sine positions stay
                _initialise_leaf(leaf, parameter)


POSITION_NORM = 4.0  # of a position's embedding; the features beside it have about 1 an axis
FIRST_LOGIT = 5.0  # by which a head prefers its position: 0.94 of the weight among nine


@torch.no_grad()
def initialise_positional(clip: nn.Module) -> None:
    """Let each head of an attention pooling start at one position, in turn; in place.

    open_clip's own start is near a mean over positions, and a mean forgets where things were. On
    aligned images (faces, icons) that costs most of the early epochs (benchmarks/RESULTS.md).
    Raises ValueError for towers without such a pooling.
    """
    pools = [module for module in clip.modules() if isinstance(module, AttentionPool2d)]
    if not pools:
        raise ValueError("there is no attention pooling of a ResNet in these towers")
    for pool in pools:
        num_positions, dim = len(pool.positional_embedding) - 1, pool.positional_embedding.shape[1]
        head_dim = dim // pool.num_heads
        directions = torch.linalg.qr(torch.randn(dim, num_positions)).Q.T  # (positions, dim)
        pool.positional_embedding[1:] += POSITION_NORM * directions
        for head in range(pool.num_heads):
            row = head * head_dim  # one of the head's axes asks for the position and nothing else
            pool.k_proj.weight[row] = directions[head % num_positions]
            pool.q_proj.weight[row] = 0.0
            pool.q_proj.bias[row] = FIRST_LOGIT * math.sqrt(head_dim) / POSITION_NORM


def _initialise_layer(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        if name.endswith(_HEADS):
            _lecun_normal(module.weight, module.in_features)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6 if name.endswith(_MLP) else 0.0)
    elif isinstance(module, nn.Conv2d):
        _lecun_normal(module.weight, module.weight[0].numel())
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def _initialise_leaf(leaf: str, parameter: Tensor) -> None:
    if leaf in _POSITIONS:
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    elif leaf in _CLASS_TOKENS:
        nn.init.zeros_(parameter)
    elif leaf in _PROBES:
        nn.init.xavier_uniform_(parameter)
    elif leaf in _PROJECTIONS and parameter.ndim == 2:
        _lecun_normal(parameter, parameter.shape[0])  # stored (in, out)
    elif leaf == "in_proj_weight":
        for part in parameter.chunk(3):  # query, key and value are kernels of their own
            nn.init.xavier_uniform_(part)
    elif leaf == "in_proj_bias":
        nn.init.zeros_(parameter)


def _lecun_normal(weight: Tensor, fan_in: int) -> None:
    std = math.sqrt(1 / fan_in) / 0.87962566103423978  # flax: std of a normal cut at 2 sigma
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
