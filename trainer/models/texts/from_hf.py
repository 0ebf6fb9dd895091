"""A Hugging Face encoder in a local folder, of the extra `hf`; nothing is ever downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ConfigError

PREFIX = "hf:"
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


class HuggingFaceTower(nn.Module):
    """(n, T) of the folder's own tokens -> (n, d): the mean over real tokens, projected if its
    size is not `embedding_dim`.

    Without dropout of attention weights, which cannot be keyed by sample (`trainer/dropout.py`);
    its other dropout stays.
    """

    def __init__(self, folder: Path, *, embedding_dim: int, load_weights: bool) -> None:
        """Raises ConfigError without the package, and where the folder holds no such model."""
        super().__init__()
        config, self.transformer = _open(folder, load_weights=load_weights)
        padding = getattr(config, "pad_token_id", None)
        if padding is None:
            raise ConfigError(f"model.name = 'hf:{folder}': its config.json has no pad_token_id")
        self._padding = int(padding)
        width = int(config.hidden_size)
        same = width == embedding_dim
        self.proj = nn.Identity() if same else nn.Linear(width, embedding_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        present = tokens != self._padding
        columns = present.any(0).nonzero()
        longest = int(columns[-1]) + 1 if len(columns) else 1
        tokens, present = tokens[:, :longest].long(), present[:, :longest]
        mask = present.long()
        x = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
        x = torch.where(present.unsqueeze(2), x, 0.0)
        means = x.sum(1) / mask.sum(1).clamp(min=1).unsqueeze(1).to(x.dtype)
        rows: Tensor = self.proj(means)
        return rows

    def set_grad_checkpointing(self) -> None:
        """Keep only the input of each layer for the backward pass."""
        self.transformer.gradient_checkpointing_enable({"use_reentrant": False})


def _open(folder: Path, *, load_weights: bool) -> tuple[Any, Any]:
    """The folder's configuration, and its encoder in float32."""
    name = f"model.name = 'hf:{folder}'"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}: {folder.absolute()} is no folder with a config.json")
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ConfigError(
            f"{name} needs the package transformers: `pip install 'nsphere[hf]'`"
        ) from None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        for option in _ATTENTION_DROPOUT:
            if hasattr(config, option):
                setattr(config, option, 0.0)
        if load_weights:
            model = AutoModel.from_pretrained(
                folder, config=config, local_files_only=True, dtype=torch.float32
            )
        else:
            model = AutoModel.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name} cannot be opened: {line}") from error
    encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # it would be trained by nothing
    return config, encoder
