"""The text side of an open_clip model, built without its image side."""

import warnings
from typing import Any

from open_clip.factory import load_state_dict
from open_clip.model import _build_text_tower, convert_to_custom_text_state_dict
from torch import Tensor, nn

from trainer.config import ConfigError
from trainer.models.architecture import Architecture, find_weights
from trainer.models.build import why_not_built

PREFIX = "open_clip:"


class OpenClipTower(nn.Module):
    """(n, T) of the model's own tokens -> (n, d)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        cfg = architecture.model_cfg
        text = {**architecture.text_cfg, "hf_model_pretrained": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.text: Any = _build_text_tower(
                    cfg["embed_dim"], text, quick_gelu=cfg.get("quick_gelu", False)
                )
        except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise ConfigError(why_not_built(architecture, str(error))) from error

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.text(tokens.long())
        pooled: Tensor = rows[0] if isinstance(rows, tuple) else rows  # CoCa gives tokens too
        return pooled

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each block for the backward pass."""
        self.text.set_grad_checkpointing(True)

    def load(self, architecture: Architecture) -> None:
        """Take the text side of the published weights. Raises ConfigError where it is not there."""
        path = find_weights(architecture)
        stored = convert_to_custom_text_state_dict(dict(load_state_dict(str(path))))
        found = {n.removeprefix("text."): t for n, t in stored.items() if n.startswith("text.")}
        try:
            self.text.load_state_dict(found, strict=False)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:300]
            raise ConfigError(f"model.pretrained: {path} does not fit: {line}") from error
        missing = sorted(dict(self.text.named_parameters()).keys() - found.keys())
        if missing:
            raise ConfigError(f"model.pretrained: {path} has no {missing[0]} of a text tower")
