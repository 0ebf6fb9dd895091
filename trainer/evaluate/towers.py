"""A model over an evaluation set: every rank embeds its own batches, in step with the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import EvalBatch
from data.text import caption_hash
from trainer.evaluate.classes import ClassNames, class_prompts
from trainer.evaluate.zero_shot import class_embedding
from trainer.ranks import Ranks

Tokenizer = Callable[[list[str]], Tensor]  # m texts -> (m, T) int64


@dataclass(frozen=True)
class Embedded:
    """This rank's samples: images as embeddings, captions as they came."""

    images: Tensor  # (n, d) unit rows
    norms: Tensor  # (n,) what the model gave them as length
    ids: Tensor  # (n,)
    labels: Tensor  # (n,)
    tokens: list[Tensor]  # (m, T) in all, a batch's together
    owners: Tensor  # (m,) sample id of the image of each caption
    caption_ids: Tensor  # (m,)
    num_bad: int  # samples left out because they cannot be read
    label_names: frozenset[tuple[int, str]]  # each (label, caption) of labelled samples


class Towers:
    """A model that embeds without gradient, the same number of times on every rank.

    Image and text towers, or one backbone for images. `flip` adds to each image's row that of its
    mirror image; `quarter_turns` lays the unit rows of an image turned by 0 to 3 quarters one after
    the other, which makes d four times as large. ZeRO stage 3 gathers parameters in every forward
    pass, so a rank that has nothing left embeds a row of zeros and drops the answer.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        *,
        batch_size: int,
        autocast: torch.dtype | None,
        flip: bool = False,
        quarter_turns: bool = False,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._batch_size = batch_size
        self._autocast = autocast
        self._flip = flip
        self._num_turns = 4 if quarter_turns else 1

    def embed(self, batches: Iterable[EvalBatch]) -> Embedded:
        """All images of this rank's batches; tokens are kept for `embed_texts`."""
        columns: list[tuple[Tensor, ...]] = []
        label_names: set[tuple[int, str]] = set()
        num_bad = 0

        def iter_images() -> Iterator[Tensor]:
            nonlocal num_bad
            for batch in batches:
                caption_ids = torch.tensor([caption_hash(text) for text in batch.captions])
                owners = batch.ids[batch.text_owner]
                columns.append((batch.ids, batch.labels, owners, caption_ids.long(), batch.texts))
                labels = batch.labels[batch.text_owner].tolist()
                label_names.update(zip(labels, batch.captions, strict=True))
                num_bad += len(batch.bad)
                yield batch.images

        rows = self._run(iter_images(), self._image_rows, torch.uint8)
        nothing = torch.zeros(0, dtype=torch.int64)
        ids, labels, owners, caption_ids = (
            torch.cat([nothing, *(column[i] for column in columns)]).to(self._ranks.device)
            for i in range(4)
        )
        return Embedded(
            images=F.normalize(rows, dim=1),
            norms=torch.linalg.vector_norm(rows, dim=1),
            ids=ids,
            labels=labels,
            tokens=[column[4] for column in columns],
            owners=owners,
            caption_ids=caption_ids,
            num_bad=num_bad,
            label_names=frozenset(pair for pair in label_names if pair[0] >= 0),
        )

    def embed_texts(self, tokens: Iterable[Tensor]) -> Tensor:  # (m, d) unit rows
        """Token rows as embeddings, at most `batch_size` at once."""
        chunks = self._in_chunks(tokens)
        return self._run(chunks, lambda rows: self._model(None, rows).texts, torch.int64)

    def embed_queries(self, tokens: Iterable[Tensor]) -> Tensor:  # (n, d) unit rows
        """The same by a text model, of queries."""
        chunks = self._in_chunks(tokens)
        return self._run(chunks, lambda rows: self._model(rows).queries, torch.int64)

    def embed_labels(self, tokens: Iterable[Tensor]) -> Tensor:  # (m, d) unit rows
        """The same by a text model, of label texts."""
        chunks = self._in_chunks(tokens)
        return self._run(chunks, lambda rows: self._model(None, rows).labels, torch.int64)

    def _in_chunks(self, tokens: Iterable[Tensor]) -> Iterator[Tensor]:
        return (chunk.long() for rows in tokens for chunk in rows.split(self._batch_size))

    def embed_classes(
        self, classes: Sequence[ClassNames], templates: Sequence[str], tokenizer: Tokenizer
    ) -> tuple[Tensor, Tensor]:  # (c, d) unit rows, (c,) labels: this rank's part
        """Class embeddings, dealt to the ranks in blocks of about `batch_size` prompts."""
        prompts = [class_prompts(names, templates) for names in classes]
        block = max(1, self._batch_size // max(len(texts) for texts in prompts))
        here = [
            number
            for number in range(len(classes))
            if number // block % self._ranks.world_size == self._ranks.rank
        ]
        blocks = [here[start : start + block] for start in range(0, len(here), block)]
        rows = self.embed_texts(
            tokenizer([text for number in numbers for text in prompts[number]])
            for numbers in blocks
        )
        embeddings = rows.new_empty((len(here), rows.shape[1]))
        for place, part in enumerate(rows.split([len(prompts[number]) for number in here])):
            embeddings[place] = class_embedding(part)
        labels = torch.tensor([classes[number].label for number in here], dtype=torch.int64)
        return embeddings, labels.to(rows.device)

    def _image_rows(self, images: Tensor) -> Tensor:
        if self._num_turns == 1:
            return self._view_rows(images)
        turned = (images.rot90(quarters, dims=(2, 3)) for quarters in range(self._num_turns))
        return torch.cat([F.normalize(self._view_rows(view), dim=1) for view in turned], dim=1)

    def _view_rows(self, images: Tensor) -> Tensor:
        """What the model's answer begins with, whichever kind of model it is."""
        rows: Tensor = self._model(images)[0].float()
        return rows + self._model(images.flip(-1))[0].float() if self._flip else rows

    def _run(
        self, chunks: Iterable[Tensor], tower: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:  # (n, d) float32
        device = self._ranks.device
        parts = [torch.zeros((0, 0), device=device)]
        with (
            torch.no_grad(),
            torch.autocast(device.type, self._autocast, enabled=self._autocast is not None),
        ):
            for chunk, num_rows in in_step(chunks, dtype, self._ranks):
                rows = tower(chunk.to(device, non_blocking=True))
                parts.append(rows[:num_rows].float())
        return torch.cat(parts[1:] or parts)


def in_step(
    chunks: Iterable[Tensor],  # each (n, ...) with rows of one shape, on all ranks
    dtype: torch.dtype,
    ranks: Ranks,
) -> Iterator[tuple[Tensor, int]]:
    """This rank's chunks and their lengths, then blank rows and 0 until every rank has ended."""
    rest = (chunk for chunk in chunks if len(chunk))
    while True:
        chunk = next(rest, None)
        shape = _agree_on_shape(chunk, ranks)
        if shape is None:
            return
        if chunk is None:
            yield torch.zeros((1, *shape), dtype=dtype), 0
        else:
            yield chunk, len(chunk)


def _agree_on_shape(chunk: Tensor | None, ranks: Ranks) -> tuple[int, ...] | None:
    """Shape of a row on the ranks that have a chunk; None when no rank has one."""
    if ranks.group is None:
        return None if chunk is None else chunk.shape[1:]
    shape = torch.zeros(4, dtype=torch.int64, device=ranks.device)
    if chunk is not None:
        shape[: chunk.dim() - 1] = torch.tensor(chunk.shape[1:])
    dist.all_reduce(shape, op=dist.ReduceOp.MAX, group=ranks.group)
    return tuple(size for size in shape.tolist() if size) or None
