"""How deep in its tower a parameter sits: what partial unlocking and layer-wise decay count by.

Group 0 is the stem (patches, tokens, positions), each block is a group, norms and pooling that
follow belong to the last block, and a projection is a group of its own. For open_clip's own
towers this is the grouping of `lock_image_tower` and `lock_text_tower`; for timm's it is the
trunk's `group_matcher`; a face backbone groups its own (`parameter_depths`); text towers of
`trainer/models/texts` have open_clip's names for it.
"""

import re
from dataclasses import dataclass
from typing import Literal

from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

from trainer.models.faces import FaceModel
from trainer.models.texts import TextModel
from trainer.models.towers import TwoTower

_BLOCK = re.compile(r"(?:resblocks|layers?|blocks?)\.(\d+)\.")
_RESNET_STAGE = re.compile(r"layer(\d)\.")
_LAST = re.compile(
    r"(ln_post|ln_final|attn_pool|attn_pool_contrastive"
    r"|transformer\.(pooler|layer_norm|final_layer_norm|norm))\b"
)
_PROJECTION = re.compile(r"(proj|text_projection|attnpool)\b")


@dataclass(frozen=True)
class Layer:
    """Place of a parameter; `above` counts the groups between it and the output."""

    tower: Literal["image", "text"]
    depth: int
    above: int


def parameter_layers(model: TwoTower | FaceModel | TextModel) -> dict[str, Layer]:
    """Layer of every tower parameter by its name in `model`; scale and bias have none."""
    if isinstance(model, FaceModel):
        depths: dict[str, int] = model.backbone.parameter_depths()
        last = max(depths.values())
        return {f"backbone.{name}": Layer("image", at, last - at) for name, at in depths.items()}
    if isinstance(model, TextModel):
        found: dict[str, Layer] = {}
        for which, tower in model.towers.items():
            names = {n: n.removeprefix("text.") for n, _ in tower.named_parameters()}
            found |= _place("text", names, _named_depths(list(names.values())), f"towers.{which}.")
        return found
    image, text = {}, {}
    for name, _ in model.clip.named_parameters():
        if name.startswith("visual."):
            image[name] = name.removeprefix("visual.")
        elif not name.startswith("text_decoder."):  # CoCa's captioner is in neither tower
            text[name] = name.removeprefix("text.")
    return _place("image", image, _image_depths(model.clip.visual)) | _place(
        "text", text, _named_depths(list(text.values()))
    )


def _place(
    tower: Literal["image", "text"],
    names: dict[str, str],
    depths: dict[str, int],
    prefix: str = "clip.",
) -> dict[str, Layer]:
    last = max(depths.values())
    return {
        prefix + full: Layer(tower, depths[short], last - depths[short])
        for full, short in names.items()
    }


def _image_depths(visual: nn.Module) -> dict[str, int]:
    names = [name for name, _ in visual.named_parameters()]
    if not isinstance(visual, TimmModel):
        return _named_depths(names)
    trunk: dict[str, int] = group_parameters(
        visual.trunk, visual.trunk.group_matcher(), reverse=True
    )
    depths = {f"trunk.{name}": depth for name, depth in trunk.items()}
    head = max(depths.values()) + 1
    return {name: depths.get(name, head) for name in names}


def _named_depths(names: list[str]) -> dict[str, int]:
    blocks = {
        name: int(found[1]) + (0 if found.re is _RESNET_STAGE else 1)
        for name in names
        if (found := _RESNET_STAGE.match(name) or _BLOCK.search(name))
    }
    last = max(blocks.values(), default=0)

    def depth(name: str) -> int:
        if name in blocks:
            return blocks[name]
        if _PROJECTION.match(name):
            return last + 1
        return last if _LAST.match(name) else 0

    return {name: depth(name) for name in names}
