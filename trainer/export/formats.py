"""Which files a checkpoint can become: what `nsphere export` calls.

A format is a function here and a line in `TOWER_FORMATS`, `FACE_FORMATS` or `TEXT_FORMATS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.centers.files import StoredCenters
from trainer.checkpoint import find_checkpoint, load_checkpoint_config, load_weights
from trainer.config import Config, ConfigError, ModelConfig
from trainer.export.centers import export_centers
from trainer.export.faces import export_face_safetensors, load_faces
from trainer.export.onnx_file import OnnxOptions, export_onnx
from trainer.export.texts import export_labels, export_text_safetensors
from trainer.export.towers import export_open_clip, export_safetensors, load_towers
from trainer.objectives.label_sides import load_label_table


@dataclass(frozen=True)
class Request:
    """What is exported and where to."""

    checkpoint: Path
    config: Config
    out: Path
    ema: bool  # the averaged weights, where there are some
    onnx: OnnxOptions

    def weights(self) -> Mapping[str, Tensor]:
        """Whole float32 weights by the model's names."""
        return load_weights(self.checkpoint, ema=self.ema)

    def plain_model(self) -> ModelConfig:
        """`[model]` without what only training wants."""
        return self.config.model.model_copy(update={"compile": False, "grad_checkpointing": False})


def export_checkpoint(
    source: Path, out: Path, format_name: str, onnx: OnnxOptions, *, ema: bool
) -> str:
    """Write a run's newest or the named checkpoint as `format_name`; a line for people.

    Empty: open_clip for image and text towers, safetensors for face models and text towers. Raises
    ConfigError with the formats that there are for this model.
    """
    checkpoint = find_checkpoint(source)
    config = load_checkpoint_config(checkpoint)
    formats = FACE_FORMATS if config.has_centers else TOWER_FORMATS
    if config.has_labels:
        formats = TEXT_FORMATS
    name = format_name or next(iter(formats))
    if name not in formats:
        raise ConfigError(
            f"--format={name}: a run with loss.name = {config.loss.name!r} becomes"
            f" {', '.join(formats)}"
        )
    written = formats[name](Request(checkpoint, config, out, ema, onnx))
    return f"{checkpoint} -> {written}"


def _open_clip(request: Request) -> str:
    out, config = request.out, request.config
    export_open_clip(request.weights(), config.model, out, loss_name=config.loss.name)
    return f'{out}: open_clip.create_model_and_transforms("local-dir:{out}")'


def _tower_safetensors(request: Request) -> str:
    return str(export_safetensors(request.weights(), request.out))


def _tower_onnx(request: Request) -> str:
    loss_name = request.config.loss.name
    model = load_towers(request.weights(), request.plain_model(), loss_name=loss_name)
    return f"{request.out} (image tower): {export_onnx(model, request.out, request.onnx)}"


def _face_safetensors(request: Request) -> str:
    return str(export_face_safetensors(request.weights(), request.config.model, request.out))


def _face_centers(request: Request) -> str:
    stored = StoredCenters.open(request.checkpoint)
    return f"{export_centers(stored, request.out)}: {stored.num_classes:,} identities"


def _face_onnx(request: Request) -> str:
    model = load_faces(request.weights(), request.plain_model())
    return f"{request.out}: {export_onnx(model, request.out, request.onnx)}"


def _text_safetensors(request: Request) -> str:
    return str(export_text_safetensors(request.weights(), request.config, request.out))


def _text_labels(request: Request) -> str:
    config = request.config
    table = load_label_table(config)
    weights = request.weights() if config.labels.rows == "texts" else None
    written = export_labels(weights, config, request.checkpoint, table, request.out)
    return f"{written}: {table.num_labels:,} labels"


TOWER_FORMATS: dict[str, Callable[[Request], str]] = {
    "open_clip": _open_clip,
    "safetensors": _tower_safetensors,
    "onnx": _tower_onnx,
}
FACE_FORMATS: dict[str, Callable[[Request], str]] = {
    "safetensors": _face_safetensors,
    "onnx": _face_onnx,
    "centers": _face_centers,
}
TEXT_FORMATS: dict[str, Callable[[Request], str]] = {
    "safetensors": _text_safetensors,
    "labels": _text_labels,
}
