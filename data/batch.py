"""Samples of an index -> tensors: read, decode, transform, tokenize; bad samples are replaced.

Everything here is a function of the samples and their positions, so that it is the same in any
worker of any rank. The processes around it are in `data/loader.py`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data.augment import ImageTransform, KeyedRng
from data.config import DataConfig
from data.dataset import Int64s, Piece, Rows, SampleSet
from data.decode import BadSample, decode_image
from data.errors import DataError
from data.index import Entry, Index, Part
from data.order import derive_key
from data.read import Reader, Span
from data.text import CaptionReader, Tokenizer, TokenizerSpec, build_tokenizer, caption_hash

MAX_SUBSTITUTES = 32
"""Samples tried in place of a bad one before the data is called unusable."""
_SUBSTITUTE = 4  # what the key is for; 1 to 3 are the order's


class Bad(NamedTuple):
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Rows of one global batch, on the CPU."""

    images: Tensor  # (n, 3, H, W) uint8, channels last in memory; (n, 3, 0, 0) of texts alone
    texts: Tensor  # (n, T) int64
    ids: Tensor  # (n,) int64 sample id over all sources, of the sample really delivered
    caption_ids: Tensor  # (n,) int64 hash of the caption chosen
    labels: Tensor  # (n,) int64, -1 when unknown
    positions: Tensor  # (n,) int64 places in the run's stream of samples
    keys: list[str]
    """(n,) "<shard name>:<key>"."""
    num_bad: int = 0
    """Rows whose own sample was bad and that hold a substitute."""
    bad: tuple[Bad, ...] = ()
    """Each sample that could not be used, substitutes that were bad too included."""

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where copies to a GPU overlap with work."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})


_TENSORS = ("images", "texts", "ids", "caption_ids", "labels", "positions")


@dataclass(frozen=True)
class EvalBatch:
    """Samples of an evaluation; one that is bad is left out."""

    images: Tensor  # (n, 3, H, W) uint8
    ids: Tensor  # (n,) int64 sample id in the index
    labels: Tensor  # (n,) int64, -1 when unknown
    texts: Tensor  # (m, T) int64 all captions of all n samples
    text_owner: Tensor  # (m,) int64 row of this batch that each text belongs to
    captions: list[str]
    """(m,) the texts before they were tokenized."""
    keys: list[str]
    bad: tuple[Bad, ...] = ()


def join_batches(pieces: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in order."""
    if len(pieces) == 1:
        return pieces[0]
    return Batch(
        **{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in _TENSORS},
        keys=[key for piece in pieces for key in piece.keys],
        num_bad=sum(piece.num_bad for piece in pieces),
        bad=tuple(bad for piece in pieces for bad in piece.bad),
    )


class SampleReader:
    """Bytes of samples, and pictures and captions from bytes; open files stay in the process.

    Without a transform, and where the configuration has no image key, samples are texts alone.
    """

    def __init__(
        self,
        config: DataConfig,
        transform: ImageTransform | None,
        spec: TokenizerSpec | None,
        indexes: Sequence[Index],
    ) -> None:
        self.config = config
        self._transform = transform if config.image_key else None
        self.captions = CaptionReader(config.caption_key, normalize=config.normalize_captions)
        self.tokenizer: Tokenizer | None = build_tokenizer(spec) if spec else None
        self._wanted = [config.image_key] if self.has_images else []
        if self.reads_captions:
            self._wanted.append(";".join(self.captions.endings))
        self._reader = Reader(
            cache_dir=config.cache_dir,
            cache_bytes=config.cache_bytes,
            versions={
                shard.url: (shard.size_bytes, shard.version)
                for index in indexes
                for shard in index.shards
            },
        )

    @property
    def has_images(self) -> bool:
        """Images are the first member that is read of a sample."""
        return self._transform is not None

    @property
    def reads_captions(self) -> bool:
        """Captions are the last member that is read of a sample."""
        return self.tokenizer is not None

    def read(self, entries: Sequence[Entry]) -> list[tuple[memoryview | bytes, ...]]:
        """Image and caption member of each entry, those that are wanted; DataError where a shard
        cannot be read.
        """
        found = self._reader.read_many(self._spans(entries))
        each = len(self._wanted)
        return [tuple(found[row * each : (row + 1) * each]) for row in range(len(entries))]

    def will_need(self, entries: Sequence[Entry]) -> None:
        """These will be read soon: let the system, or the node's cache, fetch them meanwhile."""
        self._reader.will_need(self._spans(entries))

    def picture(
        self, member: memoryview | bytes, rng: np.random.Generator | None, out: Tensor
    ) -> None:
        """Decode and transform an image member into `out`; BadSample when it cannot be."""
        if self._transform is None:
            raise ValueError("this reader is of texts alone")
        self._transform(decode_image(member, self.config.max_pixels), rng, out)

    def new_images(self, num: int) -> Tensor:  # (num, 3, H, W) uint8
        """Memory for pictures, in the layout that is fastest to fill; none for texts alone."""
        if self._transform is None:
            return torch.empty((num, 3, 0, 0), dtype=torch.uint8)
        height, width = self._transform.size
        shape = (num, height, width, 3)
        images = torch.empty(0, dtype=torch.uint8)
        if get_worker_info() is None:
            images = images.new_empty(shape)
        else:  # where the trainer's process reads it: a worker's private memory would be copied
            storage = torch.UntypedStorage._new_shared(math.prod(shape))
            images.set_(storage, 0, shape, (height * width * 3, width * 3, 3, 1))
        return images.permute(0, 3, 1, 2)

    def tokens(self, captions: Sequence[str]) -> Tensor:  # (n, T) int64
        """Tokens of captions; without a tokenizer rows of none."""
        if self.tokenizer is None:
            return torch.empty((len(captions), 0), dtype=torch.int64)
        return self.tokenizer(captions)

    def _spans(self, entries: Sequence[Entry]) -> list[Span]:
        return [
            (entry.shard, part.offset, part.size)
            for entry in entries
            for part in self._parts(entry)
        ]

    def _parts(self, entry: Entry) -> Iterator[Part]:
        for endings in self._wanted:
            part = entry.part(endings)
            if part is None:
                raise DataError(f"{entry.name} has no member with the ending {endings}")
            yield part


class TrainRows:
    """Positions -> Batch, with augmentation and substitutes keyed by seed and position."""

    def __init__(
        self, samples: SampleSet, reader: SampleReader, *, global_batch_size: int, seed: int
    ) -> None:
        self.samples = samples
        self.reader = reader
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._image_rng = KeyedRng(seed, "image")
        self._caption_rng = KeyedRng(seed, "caption")

    def load(self, piece: Piece) -> Batch:
        """The samples at these positions, a bad one replaced by a good one of its source."""
        if piece.ahead is not None:
            self.reader.will_need(self.samples.entries(piece.ahead))
        rows = self.samples.rows(piece.positions, self.global_batch_size, piece.segments)
        entries = self.samples.entries(rows.ids)
        members = self.reader.read(entries)
        images = self.reader.new_images(len(entries))
        slots, epochs, ids = images.unbind(), rows.epochs.tolist(), rows.ids.tolist()
        captions, bad, num_bad = list[str](), list[Bad](), 0
        for row, entry in enumerate(entries):
            try:
                caption = self._fill(slots[row], members[row], epochs[row], ids[row])
            except BadSample as error:
                bad.append(Bad(entry.shard, entry.key, str(error)))
                num_bad += 1
                found = self._substitute(slots[row], rows, row, entry.label, bad)
                ids[row], entries[row], caption = found
            captions.append(caption)
        return Batch(
            images=images,
            texts=self.reader.tokens(captions),
            ids=torch.tensor(ids, dtype=torch.int64),
            caption_ids=torch.tensor([caption_hash(text) for text in captions], dtype=torch.int64),
            labels=torch.tensor([entry.label for entry in entries], dtype=torch.int64),
            positions=torch.from_numpy(piece.positions),
            keys=[entry.name for entry in entries],
            num_bad=num_bad,
            bad=tuple(bad),
        )

    def _fill(
        self, image: Tensor, members: tuple[memoryview | bytes, ...], epoch: int, sample: int
    ) -> str:
        """Put the sample's picture into `image`; return the caption drawn for it."""
        caption = ""
        if self.reader.reads_captions:
            choices = self.reader.captions.captions(members[-1])
            caption = choices[0]
            if len(choices) > 1:
                caption = self.reader.captions.choose(choices, self._caption_rng(epoch, sample))
        if self.reader.has_images:
            self.reader.picture(members[0], self._image_rng(epoch, sample), image)
        return caption

    def _substitute(
        self, image: Tensor, rows: Rows, row: int, label: int, bad: list[Bad]
    ) -> tuple[int, Entry, str]:
        """A good sample drawn by position, so that every world size draws the same one."""
        source, epoch = int(rows.sources[row]), int(rows.epochs[row])
        position = int(rows.positions[row])
        step = position // self.global_batch_size
        batch = self.samples.batch(step, self.global_batch_size, rows.segments)
        taken = set(batch.ids.tolist())
        for attempt in range(MAX_SUBSTITUTES):
            key = derive_key(self.seed, _SUBSTITUTE, position, attempt)[0]
            by_label = label if attempt < MAX_SUBSTITUTES // 4 else -1
            sample = self.samples.substitute(source, key, by_label)
            if sample in taken and attempt < MAX_SUBSTITUTES // 2:
                continue  # a sample twice in a batch is worth avoiding while there is a choice
            (entry,) = self.samples.entries(np.array([sample], np.int64))
            try:
                (members,) = self.reader.read([entry])
                return sample, entry, self._fill(image, members, epoch, sample)
            except BadSample as error:
                bad.append(Bad(entry.shard, entry.key, str(error)))
        raise DataError(
            f"no usable sample among {MAX_SUBSTITUTES} drawn to replace {bad[0].key} of "
            f"{bad[0].shard} ({bad[0].reason}): most of this data cannot be decoded"
        )


class EvalRows:
    """Sample ids -> EvalBatch with every caption of each sample, without augmentation."""

    def __init__(self, index: Index, reader: SampleReader) -> None:
        self.index = index
        self.reader = reader

    def load(self, ids: Int64s) -> EvalBatch:
        """These samples, bad ones left out."""
        entries = self.index.entries(ids)
        members = self.reader.read(entries)
        images = self.reader.new_images(len(entries))
        good, captions, owners, bad = list[int](), list[str](), list[int](), list[Bad]()
        for row, entry in enumerate(entries):
            try:
                texts = list[str]()
                if self.reader.reads_captions:
                    texts = self.reader.captions.captions(members[row][-1])
                if self.reader.has_images:
                    self.reader.picture(members[row][0], None, images[len(good)])
            except BadSample as error:
                bad.append(Bad(entry.shard, entry.key, str(error)))
                continue
            captions += texts
            owners += [len(good)] * len(texts)
            good.append(row)
        return EvalBatch(
            images=images[: len(good)],
            ids=torch.from_numpy(np.asarray(ids)[good]),
            labels=torch.tensor([entries[row].label for row in good], dtype=torch.int64),
            texts=self.reader.tokens(captions),
            text_owner=torch.tensor(owners, dtype=torch.int64),
            captions=captions,
            keys=[entries[row].name for row in good],
            bad=tuple(bad),
        )
