"""`build_model`: the `[model]` section becomes a TwoTower, whatever open_clip can name."""

import math
import warnings
from importlib.util import find_spec
from typing import Any

import open_clip
import torch
from torch import nn

from trainer.config import ConfigError, ModelConfig
from trainer.models.architecture import OFFLINE, Architecture, find_weights, load_architecture
from trainer.models.initialise import initialise_big_vision, initialise_positional
from trainer.models.layers import parameter_layers
from trainer.models.towers import TwoTower

START_SCALES = {"clip": 1 / 0.07, "siglip": 10.0}
LOSSES_WITH_BIAS = ("siglip",)


def build_model(
    config: ModelConfig,
    *,
    loss_name: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    load_weights: bool = True,
) -> TwoTower:
    """Build both towers in float32, a pure function of `config` and `seed`, in training mode.

    Drawn on the CPU and then moved, so that every device starts from the same numbers; on "meta"
    nothing is drawn. `load_weights=False` leaves `config.pretrained` aside, for a caller that
    loads a checkpoint next. Raises ConfigError for what cannot be built, saying why.
    """
    architecture = load_architecture(config.name, config.pretrained)
    on_meta = torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU one alone
        clip = _construct(architecture, config)
        if not on_meta:
            _initialise(clip, config)
    _start_scale_and_bias(clip, config, loss_name)
    if architecture.weights and load_weights and not on_meta:
        _load(clip, architecture, config)
    if loss_name not in LOSSES_WITH_BIAS:
        clip.logit_bias = None
    model = TwoTower(clip, architecture, max_scale=config.max_scale).to(device)
    _lock(model, config)
    if config.grad_checkpointing:
        _checkpoint_activations(clip, config.name)
    if config.compile:
        clip.encode_image = torch.compile(clip.encode_image)
        clip.encode_text = torch.compile(clip.encode_text)
    return model.train()


def _construct(architecture: Architecture, config: ModelConfig) -> Any:
    """The bare open_clip model with random weights and a bias, which may be dropped later."""
    cfg = dict(architecture.model_cfg)
    vision, text = dict(cfg.pop("vision_cfg")), dict(cfg.pop("text_cfg"))
    vision["timm_model_pretrained"] = False
    text["hf_model_pretrained"] = False
    if config.patch_dropout:
        vision["patch_dropout"] = config.patch_dropout
    custom_text = cfg.pop("custom_text", False) or "hf_model_name" in text
    kind = open_clip.CLIP
    if custom_text:
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    cfg.update(init_logit_bias=config.init_bias, nonscalar_logit_scale=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's notes on its own renamed models
            clip = kind(vision_cfg=vision, text_cfg=text, **cfg)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(why_not_built(architecture, str(error))) from error
    if config.patch_dropout and not _drops_patches(clip.visual):
        raise ConfigError(
            f"model.patch_dropout needs a vision transformer; {config.name}'s image tower is none"
        )
    return clip


def why_not_built(architecture: Architecture, reason: str) -> str:
    """What open_clip's complaint means for whoever named the model."""
    repo = architecture.text_cfg.get("hf_model_name")
    line = " ".join(reason.split())[:300]
    where = f"model.name = {architecture.name!r}"
    if repo and find_spec("transformers") is None:
        return f"{where}: its text tower is {repo} of Hugging Face: `pip install transformers`"
    if repo:
        return f"{where}: its text tower is {repo}; {OFFLINE.format(repo=repo)} ({line})"
    return f"{where} cannot be built: {line}"


def _initialise(clip: nn.Module, config: ModelConfig) -> None:
    if config.init == "big_vision":
        initialise_big_vision(clip)
    elif config.init == "positional":
        try:
            initialise_positional(clip)
        except ValueError as error:
            raise ConfigError(f"model.init = 'positional' with {config.name!r}: {error}") from None


def _drops_patches(visual: nn.Module) -> bool:
    return any(type(module).__name__.startswith("PatchDropout") for module in visual.modules())


@torch.no_grad()
def _start_scale_and_bias(clip: Any, config: ModelConfig, loss_name: str) -> None:
    clip.logit_scale.fill_(math.log(config.init_scale or START_SCALES[loss_name]))
    clip.logit_bias.fill_(config.init_bias)


@torch.no_grad()
def _load(clip: Any, architecture: Architecture, config: ModelConfig) -> None:
    path = find_weights(architecture)
    try:
        open_clip.load_checkpoint(clip, str(path))
    except (OSError, RuntimeError, KeyError, ValueError, AssertionError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.pretrained: {path} does not fit model.name = {config.name!r}: {line}"
        ) from error
    if config.init_scale:
        clip.logit_scale.fill_(math.log(config.init_scale))
    if not clip.logit_bias.any():  # how open_clip fills in a bias that the checkpoint lacks
        clip.logit_bias.fill_(config.init_bias)


def _lock(model: TwoTower, config: ModelConfig) -> None:
    """Freeze what `lock_*` says; the groups nearest the output stay trainable."""
    kept = {
        "image": config.lock_image_unlocked_groups if config.lock_image else math.inf,
        "text": config.lock_text_unlocked_layers if config.lock_text else math.inf,
    }
    layers = parameter_layers(model)
    for name, parameter in model.clip.named_parameters():
        layer = layers.get(f"clip.{name}")
        if layer is None or layer.above >= kept[layer.tower]:
            parameter.requires_grad_(False)


def _checkpoint_activations(clip: Any, name: str) -> None:
    trunk = getattr(clip.visual, "trunk", clip.visual)
    if isinstance(trunk, open_clip.modified_resnet.ModifiedResNet):
        raise ConfigError(f"model.grad_checkpointing: {name}'s ResNet has none; set it to false")
    try:
        if trunk is not clip.visual:  # open_clip only logs when a timm trunk refuses
            trunk.set_grad_checkpointing(True)
        clip.set_grad_checkpointing(True)
    except (AssertionError, NotImplementedError, AttributeError) as error:
        raise ConfigError(f"model.grad_checkpointing: {name} has none: {error}") from None
