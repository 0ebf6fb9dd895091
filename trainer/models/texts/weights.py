"""Start weights of text towers: a run, a checkpoint, or a file of `nsphere export`."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from trainer.checkpoint import CheckpointError, find_checkpoint, load_weights
from trainer.config import ConfigError
from trainer.models.texts.model import LABELS, QUERIES, SHARED, TextModel

# Whose weights a tower takes, the first that there are.
_SOURCES = {SHARED: (SHARED, QUERIES), QUERIES: (QUERIES, SHARED), LABELS: (LABELS, SHARED)}


def load_text_weights(model: TextModel, source: str) -> None:
    """Bring the towers to those of `source`, in place; scale and bias stay as they are.

    A shared tower takes the queries' where there were two. Raises ConfigError naming the first
    tensor that does not fit.
    """
    stored = _read(source)
    for name, tower in model.towers.items():
        found: Mapping[str, Tensor] = {}
        for other in _SOURCES[name]:
            prefix = f"towers.{other}."
            found = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
            if found:
                break
        wanted = {key: tensor.shape for key, tensor in tower.state_dict().items()}
        check_shapes({k: t.shape for k, t in found.items()}, wanted, f"model.pretrained: {source}")
        tower.load_state_dict(dict(found))


def check_shapes(
    have: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Raise ConfigError naming the first tensor that is missing, unknown or of another shape."""
    for key in sorted(wanted.keys() | have.keys()):
        if key not in have:
            raise ConfigError(f"{origin}: its weights lack {key}")
        if key not in wanted:
            raise ConfigError(f"{origin}: its weights also hold {key}: set [model] as it was")
        if have[key] != wanted[key]:
            raise ConfigError(
                f"{origin}: {key} is {tuple(have[key])}, [model] makes it {tuple(wanted[key])}"
            )


def _read(source: str) -> Mapping[str, Tensor]:
    path = Path(source)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return load_weights(find_checkpoint(path), ema=True)
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"model.pretrained = {source!r}: {error}") from None
