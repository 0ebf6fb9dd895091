"""`build_text_model`: the `[model]` section becomes a TextModel."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.text import TokenizerSpec
from trainer.config import Config, ConfigError, ModelConfig
from trainer.models.architecture import Architecture, load_architecture
from trainer.models.layers import parameter_layers
from trainer.models.texts.bag import BagTower
from trainer.models.texts.from_hf import PREFIX as HF
from trainer.models.texts.from_hf import HuggingFaceTower
from trainer.models.texts.from_open_clip import PREFIX as OPEN_CLIP
from trainer.models.texts.from_open_clip import OpenClipTower
from trainer.models.texts.model import LABELS, QUERIES, SHARED, TextModel
from trainer.models.texts.transformer import TransformerTower
from trainer.models.texts.weights import check_shapes, load_text_weights

START_SCALE = 20.0  # DEXML's temperature of 0.05
START_SCALES = {
    "one_vs_all": 10.0,  # SigLIP's, which has the same loss
    "topk_hinge": 1.0,  # its margin is of cosines
}
LOSSES_WITH_BIAS = ("one_vs_all",)
TOWERS = ("bag", "transformer", OPEN_CLIP + "NAME", HF + "FOLDER")


@dataclass(frozen=True)
class Kind:
    """What `model.name` means: how a tower is made, and what its tokens are."""

    build: Callable[[], nn.Module]
    tokenizer_spec: TokenizerSpec
    embed_dim: int


def build_text_model(
    config: ModelConfig,
    *,
    loss_name: str,
    embeds_labels: bool = True,  # False: labels have rows of their own, no texts
    seed: int = 0,
    device: torch.device | str = "cpu",
    load_weights: bool = True,
) -> TextModel:
    """Build in float32, a pure function of the configuration and `seed`, in training mode.

    Drawn on the CPU and then moved, so that every device starts from the same numbers; on "meta"
    nothing is drawn. `load_weights=False` leaves start weights aside, for a caller that loads a
    checkpoint next. Raises ConfigError for what cannot be built, saying why.
    """
    _check_options(config)
    on_meta = torch.device(device).type == "meta"
    load_weights = load_weights and not on_meta
    kind = _kind(config, load_weights=load_weights)
    two = embeds_labels and not config.shared_towers
    with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU one alone
        towers = {name: kind.build() for name in ((QUERIES, LABELS) if two else (SHARED,))}
        model = TextModel(
            towers,
            tokenizer_spec=kind.tokenizer_spec,
            embed_dim=kind.embed_dim,
            scale=config.init_scale or START_SCALES.get(loss_name, START_SCALE),
            bias=config.init_bias if loss_name in LOSSES_WITH_BIAS else None,
            max_scale=config.max_scale,
        )
    if config.pretrained and load_weights and not config.name.startswith(OPEN_CLIP):
        load_text_weights(model, config.pretrained)
    model = model.to(device)
    _lock(model, config)
    for tower in model.towers.values():
        if config.grad_checkpointing:
            _recompute(tower, config.name)
        if config.compile:
            tower.compile()
    return model.train()


def _kind(config: ModelConfig, *, load_weights: bool) -> Kind:
    if config.name == "bag":
        return _bag(config)
    if config.name == "transformer":
        return _transformer(config)
    if config.name.startswith(OPEN_CLIP):
        return _open_clip(config, load_weights=load_weights)
    if config.name.startswith(HF):
        return _hugging_face(config, load_weights=load_weights)
    near = difflib.get_close_matches(config.name, TOWERS, 1, 0.3)
    raise ConfigError(
        f"model.name = {config.name!r} is no text tower; there are {', '.join(TOWERS)}"
        + (f"; nearest: {near[0]}" if near else "")
    )


def _bag(config: ModelConfig) -> Kind:
    def build() -> nn.Module:
        return BagTower(
            buckets=config.buckets,
            width=config.width,
            layers=config.layers,
            embedding_dim=config.embedding_dim,
            dropout=config.dropout,
            token_dropout=config.token_dropout,
            token_weights=config.token_weights,
        )

    if config.skip and config.ngrams == 1:
        raise ConfigError(
            f"model.skip = {config.skip} is about pairs of words: set model.ngrams = 2"
        )
    pairs = (("ngrams", config.ngrams), ("skip", config.skip))
    spec = _words(config, *pairs, ("placed_words", config.placed_words))
    return Kind(build, spec, config.embedding_dim)


def _transformer(config: ModelConfig) -> Kind:
    if config.width % config.heads:
        raise ConfigError(
            f"model.width = {config.width} is no multiple of model.heads = {config.heads}"
        )

    def build() -> nn.Module:
        return TransformerTower(
            buckets=config.buckets,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            context_length=config.context_length,
            embedding_dim=config.embedding_dim,
            dropout=config.dropout,
            drop_path=config.drop_path,
        )

    return Kind(build, _words(config), config.embedding_dim)


def _words(config: ModelConfig, *more: tuple[str, int]) -> TokenizerSpec:
    """Words hashed into the rows of a table, 0 being padding."""
    options = (("buckets", config.buckets), *more)
    return TokenizerSpec("words", context_length=config.context_length, options=options)


def _open_clip(config: ModelConfig, *, load_weights: bool) -> Kind:
    architecture: Architecture = load_architecture(
        config.name.removeprefix(OPEN_CLIP), config.pretrained
    )

    def build() -> nn.Module:
        tower = OpenClipTower(architecture)
        if architecture.weights and load_weights:
            tower.load(architecture)
        return tower

    embed_dim = int(architecture.model_cfg["embed_dim"])
    return Kind(build, architecture.tokenizer_spec, embed_dim)


def _hugging_face(config: ModelConfig, *, load_weights: bool) -> Kind:
    folder = Path(config.name.removeprefix(HF))

    def build() -> nn.Module:
        return HuggingFaceTower(
            folder, embedding_dim=config.embedding_dim, load_weights=load_weights
        )

    spec = TokenizerSpec(str(folder), context_length=config.context_length)
    return Kind(build, spec, config.embedding_dim)


_ONLY = {"token_dropout": "bag", "token_weights": "bag", "drop_path": "transformer"}


def _check_options(config: ModelConfig) -> None:
    """Options of other models, and of other text towers."""
    for option in ("lock_image", "patch_dropout"):
        if getattr(config, option):
            raise ConfigError(f"model.{option} is for image towers, not texts and labels")
    if config.init != "open_clip":
        raise ConfigError(f"model.init = {config.init!r} is for image and text towers together")
    for option, name in _ONLY.items():
        if getattr(config, option) and config.name != name:
            raise ConfigError(f"model.{option} is the {name}'s; {config.name} has none")
    if config.dropout and config.name.startswith((OPEN_CLIP, HF)):
        raise ConfigError(f"model.dropout: {config.name} brings its own")
    if config.grad_checkpointing and config.compile:
        raise ConfigError(
            "model.compile decides itself what to recompute: set grad_checkpointing or compile"
        )


def _recompute(tower: Any, name: str) -> None:
    if not hasattr(tower, "set_grad_checkpointing"):
        raise ConfigError(f"model.grad_checkpointing: a {name} has nothing to recompute")
    tower.set_grad_checkpointing()


def _lock(model: TextModel, config: ModelConfig) -> None:
    """Freeze what `lock_text` says; the layers nearest the output stay trainable."""
    kept = config.lock_text_unlocked_layers if config.lock_text else math.inf
    for name, layer in parameter_layers(model).items():
        if layer.above >= kept:
            model.get_parameter(name).requires_grad_(False)


def restore_text_model(
    weights: Mapping[str, Tensor], config: Config, *, device: torch.device | str = "cpu"
) -> TextModel:
    """The model of a run with these weights, in evaluation mode.

    Raises ConfigError naming the first tensor that does not fit the configuration.
    """
    model = build_text_model(
        config.model.model_copy(update={"compile": False, "grad_checkpointing": False}),
        loss_name=config.loss.name,
        embeds_labels=config.labels.rows == "texts",
        device=device,
        load_weights=False,
    )
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    have = {name: tensor.shape for name, tensor in weights.items()}
    check_shapes(have, wanted, f"the weights are not those of model.name = {config.model.name!r}")
    model.load_state_dict(dict(weights))
    return model.eval()
