"""Published backbone weights from a file: formats, names, and one error for what does not fit.

insightface's files have the names that our modules have; what differs is wrapped around them.
"""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import ConfigError, ModelConfig

_log = logging.getLogger("nsphere.models")

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict_backbone", "state_dict", "model", "backbone")  # insightface's, Lightning's
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")  # of DDP, compile, ours, Lightning


def plain_name(name: str) -> str:
    """A parameter's published name: `backbone.conv1.weight` or `module.conv1.weight` -> its end."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.removeprefix("trunk.")  # timm's model inside our backbone


def check_names(weights: Mapping[str, Tensor], model: nn.Module, origin: str) -> None:
    """Raise ConfigError naming the first tensor that is missing, unknown or of another shape.

    Counters of batch norms may be missing: nothing reads them.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(wanted.keys() - weights.keys() - counters)
    unknown = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name])}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name]
    ]
    for problem, names in (("lack", missing), ("also hold", unknown), ("have", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise ConfigError(f"{origin}: they {problem} {names[0]}{more}")


def load_backbone(backbone: nn.Module, config: ModelConfig) -> None:
    """Copy the weights of the file `config.pretrained` into the backbone, in place.

    Raises ConfigError for a file that is not there, not readable without running its code, or not
    this backbone's. A timm checkpoint's classifier and our norm after it start anew.
    """
    path = Path(config.pretrained)
    found = read_weights_file(path)
    own = {plain_name(name): name for name in backbone.state_dict()}
    weights = {own.get(plain_name(name), name): tensor for name, tensor in found.items()}
    fresh = _fresh_head(backbone, weights)
    if fresh:
        _log.warning("%s brings no embedding layer: %s start anew", path, ", ".join(sorted(fresh)))
    state = backbone.state_dict()
    weights |= {name: state[name] for name in fresh}
    check_names(
        weights,
        backbone,
        f"model.pretrained: {path}: the weights are not those of {config.name} with"
        f" embedding_dim = {config.embedding_dim}, image_size = {config.image_size or 'its own'}",
    )
    backbone.load_state_dict(weights, strict=False)


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Tensors by name out of .pt, .pth (weights only: no code runs) or .safetensors."""
    if not path.is_file():
        raise ConfigError(
            f"model.pretrained: {path.absolute()} does not exist; face backbones start from a file"
        )
    if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        known = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise ConfigError(f"model.pretrained: {path} ends in none of {known}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, OSError, EOFError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.pretrained: {path} holds no plain weights: {line}") from None
    return _unwrap(tree, path)


def _unwrap(tree: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    tensors = tree if isinstance(tree, dict) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConfigError(f"model.pretrained: {path} is no state dict: tensors by name are wanted")
    return dict(tensors)


def _fresh_head(backbone: nn.Module, weights: dict[str, Tensor]) -> set[str]:
    """Names that a timm checkpoint cannot fill; its own classifier is taken out of `weights`."""
    trunk = getattr(backbone, "trunk", None)
    state = backbone.state_dict()
    if trunk is None or any(name.startswith("neck.") for name in weights):
        return set()
    fresh = {name for name in state if name.startswith("neck.")}
    classifier = {id(parameter) for parameter in trunk.get_classifier().parameters()}
    for name, parameter in trunk.named_parameters():
        full = f"trunk.{name}"
        if id(parameter) in classifier and (
            full not in weights or weights[full].shape != parameter.shape
        ):
            weights.pop(full, None)
            fresh.add(full)
    return fresh
