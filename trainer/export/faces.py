"""A face backbone for others: one safetensors file under the names its publishers use."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import ModelConfig
from trainer.models.faces import FaceModel, build_face_model
from trainer.models.weights import check_names, plain_name


def load_faces(
    weights: Mapping[str, Tensor], config: ModelConfig, *, device: torch.device | str = "cpu"
) -> FaceModel:
    """A FaceModel with these weights, in evaluation mode.

    Raises ConfigError naming the first tensor that does not fit the configuration.
    """
    model = build_face_model(config, device=device, load_weights=False)
    check_names(weights, model, f"the weights are not those of {config.name}")
    model.load_state_dict(dict(weights), strict=False)
    return model.eval()


def export_face_safetensors(weights: Mapping[str, Tensor], config: ModelConfig, out: Path) -> Path:
    """Write one file; insightface's `load_state_dict` takes an IResNet's or MobileFaceNet's.

    timm's takes a timm model's, but for the norm after it (`neck.*`).
    """
    model = build_face_model(config, device="meta", load_weights=False)
    check_names(weights, model, f"the weights are not those of {config.name}")
    plain = {
        plain_name(name): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in weights.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    save_file(plain, part, {"format": "pt", "model": config.name})
    part.replace(out)
    return out
