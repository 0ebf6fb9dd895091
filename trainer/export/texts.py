"""Text towers for others as safetensors, and the rows of their labels as Parquet."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.label_table import LabelTable
from trainer.centers.label_rows import read_label_rows
from trainer.centers.parts import Part
from trainer.config import Config
from trainer.models.texts.build import restore_text_model
from trainer.models.texts.label_texts import embed_labels, tokenize_labels

_AT_ONCE = 8192  # labels in memory


def export_text_safetensors(weights: Mapping[str, Tensor], config: Config, out: Path) -> Path:
    """Write one file: towers under `towers.texts.` (or `towers.queries.`, `towers.labels.`),
    `log_scale`, `bias`; `model.pretrained` takes it. The tokenizer is in its metadata.

    Raises ConfigError naming the first tensor that does not fit the configuration.
    """
    model = restore_text_model(weights, config)
    spec = asdict(model.tokenizer_spec)
    plain = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {"format": "pt", "model": config.model.name, "tokenizer": json.dumps(spec)}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    save_file(plain, part, metadata)
    part.replace(out)
    return out


def export_labels(
    weights: Mapping[str, Tensor] | None,  # of the towers; None: the checkpoint has classifiers
    config: Config,
    checkpoint: Path,
    table: LabelTable,
    out: Path,
) -> Path:
    """Write columns label, text, embedding (float32 unit rows); return the file.

    A block of labels is in memory at a time; the file appears whole or not at all.
    """
    blocks = (
        _classifiers(checkpoint, table.num_labels)
        if weights is None
        else _embeddings(weights, config, table)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    writer: pq.ParquetWriter | None = None
    try:
        for start, rows in blocks:
            block = _block(table, start, rows)
            if writer is None:
                writer = pq.ParquetWriter(part, block.schema, use_dictionary=False)
            writer.write_table(block)
        if writer is not None:
            writer.close()
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _classifiers(checkpoint: Path, num_labels: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, num_labels, _AT_ONCE):
        part = Part(start, min(start + _AT_ONCE, num_labels), num_labels)
        yield start, read_label_rows(checkpoint, part)


def _embeddings(
    weights: Mapping[str, Tensor], config: Config, table: LabelTable
) -> Iterator[tuple[int, Tensor]]:
    model = restore_text_model(weights, config)
    for start in range(0, table.num_labels, _AT_ONCE):
        stop = min(start + _AT_ONCE, table.num_labels)
        tokens = tokenize_labels(table, model.tokenizer_spec, start, stop)
        yield start, embed_labels(model, tokens)


def _block(table: LabelTable, start: int, rows: Tensor) -> pa.Table:
    labels = np.arange(start, start + len(rows))
    values = pa.array(rows.to(torch.float32).flatten().numpy())
    return pa.table(
        {
            "label": pa.array(labels, pa.int64()),
            "text": pa.array(table.texts_of(labels), pa.large_string()),
            "embedding": pa.FixedSizeListArray.from_arrays(values, rows.shape[1]),
        }
    )
