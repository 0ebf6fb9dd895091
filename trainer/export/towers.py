"""Weights for people without this repository: a folder open_clip loads offline, or one file.

The input is a plain state dict of a TwoTower (`trainer.checkpoint.load_weights`). Checkpoints that
training resumes from are `trainer/checkpoint.py`.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import ConfigError, ModelConfig
from trainer.models import TwoTower, build_model

_log = logging.getLogger("nsphere.export")


def load_towers(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    loss_name: str,
    device: torch.device | str = "cpu",
) -> TwoTower:
    """A TwoTower with these weights, in evaluation mode.

    Raises ConfigError naming the first keys that do not fit the configuration.
    """
    model = build_model(config, loss_name=loss_name, device=device, load_weights=False)
    _check_keys(weights, model, config.name)
    model.load_state_dict(dict(weights))
    return model.eval()


def export_open_clip(
    weights: Mapping[str, Tensor], config: ModelConfig, out: Path, *, loss_name: str
) -> Path:
    """Write a folder for `open_clip.create_model_and_transforms("local-dir:OUT")`; return it.

    It holds the architecture with the preprocessing the model was evaluated with, the float32
    weights as safetensors under open_clip's names, and the tokenizer where that is Hugging Face's
    and on this machine. The folder appears whole or not at all; one that exists is an error.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty: export to another folder")
    model = build_model(config, loss_name=loss_name, device="meta", load_weights=False)
    _check_keys(weights, model, config.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name) / out.name
        folder.mkdir()
        save_file(open_clip_weights(weights), folder / HF_SAFE_WEIGHTS_NAME, {"format": "pt"})
        (folder / HF_CONFIG_NAME).write_text(json.dumps(_open_clip_config(model), indent=2) + "\n")
        _save_tokenizer(model, folder)
        if out.exists():
            out.rmdir()
        shutil.move(folder, out)
    return out


def export_safetensors(weights: Mapping[str, Tensor], out: Path) -> Path:
    """Write one safetensors file with open_clip's parameter names; return it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    save_file(open_clip_weights(weights), part, {"format": "pt"})
    part.replace(out)
    return out


def open_clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A TwoTower's tensors under open_clip's names; scale and bias lose their dimension."""
    renamed = {"log_scale": "logit_scale", "bias": "logit_bias"}
    return {
        renamed.get(name, name.removeprefix("clip.")): tensor.detach()
        .reshape([] if name in renamed else tensor.shape)
        .to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def _check_keys(weights: Mapping[str, Tensor], model: TwoTower, name: str) -> None:
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(wanted[key])}"
        for key in sorted(wanted.keys() & weights.keys())
        if weights[key].shape != wanted[key]
    ]
    for problem, keys in (("lack", missing), ("also hold", unknown), ("have", shapes)):
        if keys:
            raise ConfigError(f"the weights are not those of {name}: they {problem} {keys[0]}")


def _open_clip_config(model: TwoTower) -> dict[str, Any]:
    cfg = deepcopy(model.architecture.model_cfg)
    cfg.pop("init_logit_bias", None)
    if model.bias is not None:
        cfg["init_logit_bias"] = -10.0  # any number: it tells open_clip that there is a bias
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False  # the weights are here, not on the hub
    # data/augment.py resizes bicubically whatever the published model did.
    preprocess = asdict(model.preprocess) | {"interpolation": "bicubic"}
    return {"model_cfg": cfg, "preprocess_cfg": preprocess}


def _save_tokenizer(model: TwoTower, folder: Path) -> None:
    spec = model.tokenizer_spec
    if not spec.name:
        return
    try:
        HFTokenizer(spec.name, spec.context_length).save_pretrained(folder)
    except (ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        _log.warning("exported without the tokenizer %s, which is not here: %s", spec.name, reason)
