"""Members of one shard -> rows, one a sample, as columns.

A row is kept only if it is certain which parts belong to it: what lies beside damage, and keys
whose parts can be paired in more than one way, are dropped and reported.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.decode import image_size
from data.tar import DAMAGE, Fault, Member, split_name
from data.text import caption_hash

Read = Callable[[int, int], bytes]
"""(offset, size) -> bytes of the shard."""

MAX_TEXT_BYTES = 1 << 20  # longer captions and JSONs are left to whoever reads the sample
MAX_LABEL = 2**31 - 1  # of lists, which are kept in 4 bytes each
_FIRST_BYTES = 640  # a JPEG without EXIF tells its size here; where it does not, read further
_MORE_BYTES = 1 << 16


class Keys(NamedTuple):
    """Which member is what; alternatives are joined by `;`, an empty key is not asked for."""

    image: str = "jpg;jpeg;png;webp"
    caption: str = "txt"
    label: str = "cls"
    labels: str = "labels"
    """Member of several labels: integers with blanks between them."""

    @property
    def caption_ending(self) -> str:
        """The ending of the member that holds the caption."""
        return "json" if self.caption_field else self.caption

    @property
    def caption_field(self) -> str:
        """NAME of a `json:NAME` caption key, else empty."""
        return self.caption.partition(":")[2] if self.caption.startswith("json:") else ""


DEFAULT_KEYS = Keys()


class Note(NamedTuple):
    """A problem of the shard at hand."""

    kind: str
    offset: int
    detail: str
    key: str = ""


@dataclass(frozen=True)
class Rows:
    """Samples of a shard as columns; row i has the parts `starts[i]:starts[i + 1]`."""

    keys: list[str]
    layouts: list[tuple[str, ...]]
    """Distinct sequences of endings."""
    layout: NDArray[np.int64]  # (n,) index into `layouts`
    starts: NDArray[np.int64]  # (n + 1,)
    offsets: NDArray[np.int64]  # (parts,)
    sizes: NDArray[np.int64]  # (parts,)
    width: NDArray[np.int64]  # (n,) pixels, 0 unknown
    height: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,) -1 unknown
    caption: NDArray[np.int64]  # (n,) hash of the first caption, 0 unknown
    label_counts: NDArray[np.int64]  # (n,) labels of a list, -1 where there is none or it is bad
    label_ids: NDArray[np.int32]  # (sum of counts,) lists one after the other, each ascending

    def digest(self) -> str:
        """Identity of the samples: keys, endings and places."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([self.keys, self.layouts]).encode())
        for column in (self.layout, self.starts, self.offsets, self.sizes):
            state.update(column.astype("<i8").tobytes())
        return state.hexdigest()


class RowBuilder:
    """Takes members and faults in archive order; `finish` gives the rows and what was wrong."""

    def __init__(self, keys: Keys) -> None:
        self._facts = _Facts(keys)
        self._samples: dict[str, int] = {}
        self._endings: dict[str, int] = {}
        # One item a member: compact, since a shard may hold millions.
        self._sample, self._ending = array("q"), array("q")
        self._offset, self._size = array("q"), array("q")
        self._fact, self._second_fact = array("q"), array("q")
        self._last = -1
        self._interleaved = self._damaged = self._after_damage = False
        self._suspects: set[int] = set()
        self._broken: set[int] = set()
        self._notes: list[Note] = []

    @property
    def json_fields(self) -> list[str]:
        """Fields of the first JSON member that was parsed."""
        return self._facts.json_fields

    def add(self, member: Member, read: Read) -> None:
        """One member; `read` is asked for an image's first bytes, or for all of a short text."""
        parts = split_name(member.name)
        if parts is None:
            self._ignore(member)
            return
        key, ending = parts
        sample = self._samples.setdefault(key, len(self._samples))
        if sample != self._last:
            self._interleaved |= sample < self._last
            self._last = sample
        if self._after_damage:
            self._suspects.add(sample)
            self._after_damage = False
        fact, second_fact = self._facts.of(ending, member, read)
        self._sample.append(sample)
        self._ending.append(self._endings.setdefault(ending, len(self._endings)))
        self._offset.append(member.offset)
        self._size.append(member.size)
        self._fact.append(fact)
        self._second_fact.append(second_fact)

    def add_fault(self, fault: Fault) -> None:
        """What was wrong at this place; samples that may have lost parts become suspect."""
        parts = split_name(fault.name) if fault.name else None
        key = parts[0] if parts else ""
        self._notes.append(Note(fault.kind, fault.offset, fault.detail, key))
        if fault.kind not in DAMAGE:
            return
        self._damaged = True
        if key in self._samples:
            self._broken.add(self._samples[key])
        else:
            self._after_damage = True
            if self._last >= 0:
                self._suspects.add(self._last)

    def finish(self) -> tuple[Rows, list[Note]]:
        """The certain samples in order of their first members, and all notes."""
        self._names = list(self._samples)
        order = np.argsort(_column(self._sample), kind="stable")
        spans = list(self._certain_spans(order))
        layouts: dict[tuple[int, ...], int] = {}
        layout = [layouts.setdefault(endings, len(layouts)) for _, _, endings in spans]
        endings_of = list(self._endings)
        member = _concatenate([order[first : first + len(e)] for _, first, e in spans])
        rows = self._columns(
            keys=[self._names[sample] for sample, _, _ in spans],
            layouts=[tuple(endings_of[code] for code in endings) for endings in layouts],
            layout=np.array(layout, np.int64),
            starts=np.cumsum([0, *(len(endings) for _, _, endings in spans)], dtype=np.int64),
            member=member,
        )
        return rows, sorted([*self._notes, *self._facts.notes], key=lambda note: note.offset)

    def _ignore(self, member: Member) -> None:
        if not member.name.startswith("__"):
            detail = f"{member.name} has no key or no ending, so it is no sample's part"
            self._notes.append(Note("ignored_member", member.offset, detail))

    def _certain_spans(
        self,
        order: NDArray[np.int64],  # (members,) sorted by sample
    ) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(sample, first place in `order`, endings) of every sample that may be used."""
        samples = _column(self._sample)[order]
        codes = _column(self._ending)[order].tolist()
        bounds = np.flatnonzero(np.diff(samples, prepend=-1, append=len(self._samples)))
        for sample, (first, last) in enumerate(pairwise(bounds.tolist())):
            endings = tuple(codes[first:last])
            if self._damaged and not self._is_whole(sample, set(endings)):
                if sample not in self._broken:  # else the fault itself names the key
                    detail = "lies beside damage and may have lost parts"
                    self._note("incomplete", order[first], detail)
            elif len(set(endings)) == len(endings):
                yield sample, first, endings
            else:
                pieces = self._split_repeats(endings, order[first:last])
                for piece in pieces:
                    yield sample, first, piece
                    first += len(piece)

    def _is_whole(self, sample: int, endings: set[int]) -> bool:
        """Beside damage, only a sample with every ending that the shard has counts as whole."""
        if sample in self._broken:
            return False
        if sample not in self._suspects and not self._interleaved:
            return True
        others = len(self._samples) - len(self._suspects | self._broken)
        return (others > 0 or self._interleaved) and len(endings) == len(self._endings)

    def _split_repeats(
        self,
        endings: tuple[int, ...],
        members: NDArray[np.int64],  # (len(endings),)
    ) -> list[tuple[int, ...]]:
        """A key that comes again is another sample, if the parts pair in one way only."""
        pieces = _cut_at_repeats(endings)
        certain = len({frozenset(piece) for piece in pieces}) == 1
        verdict = "each is a sample" if certain else "which parts belong together is not certain"
        detail = f"the key comes {len(pieces)} times: {verdict}"
        self._note("duplicate_key", members[len(pieces[0])], detail)
        return pieces if certain else []

    def _note(self, kind: str, member: np.int64, detail: str) -> None:
        key = self._names[self._sample[member]]
        self._notes.append(Note(kind, self._offset[member], detail, key))

    def _columns(
        self,
        keys: list[str],
        layouts: list[tuple[str, ...]],
        layout: NDArray[np.int64],  # (n,)
        starts: NDArray[np.int64],  # (n + 1,)
        member: NDArray[np.int64],  # (parts,)
    ) -> Rows:
        asked = self._facts.keys

        def fact(column: "array[int]", endings: str, unknown: int) -> NDArray[np.int64]:
            places = [find_ending(names, endings) for names in layouts]
            place = np.array(places, np.int64)[layout]
            at = member[starts[:-1] + np.maximum(place, 0)] if len(layout) else member[:0]
            return np.where(place < 0, unknown, _column(column)[at])

        list_starts = fact(self._fact, asked.labels, 0)
        list_counts = fact(self._second_fact, asked.labels, -1)
        return Rows(
            keys=keys,
            layouts=layouts,
            layout=layout,
            starts=starts,
            offsets=_column(self._offset)[member],
            sizes=_column(self._size)[member],
            width=fact(self._fact, asked.image, 0),
            height=fact(self._second_fact, asked.image, 0),
            label=fact(self._fact, asked.label, -1),
            caption=fact(self._fact, asked.caption_ending, 0),
            label_counts=list_counts,
            label_ids=self._facts.label_ids(list_starts, list_counts),
        )


class _Facts:
    """What the first bytes of a member tell: image size, label, hash of the caption."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self._images = frozenset(keys.image.split(";")) - {""}
        self._labels = frozenset(keys.label.split(";")) - {""}
        self._captions = frozenset(keys.caption_ending.split(";")) - {""}
        self._lists = frozenset(keys.labels.split(";")) - {""}
        self._label_ids = array("i")
        self.json_fields: list[str] = []
        self.notes: list[Note] = []

    def of(self, ending: str, member: Member, read: Read) -> tuple[int, int]:
        """(width, height), (label, 0), (caption hash, 0), (start, count) of a list of labels, or
        (0, 0) of any other member.
        """
        if ending in self._images:
            return _stored_size(member, read)
        if ending in self._labels:
            return self._label(member, read), 0
        if ending in self._lists:
            return self._label_list(member, read)
        if member.size > MAX_TEXT_BYTES:
            return 0, 0
        if ending in self._captions:
            return self._caption(read(member.offset, member.size)), 0
        if ending == "json" and not self.json_fields:
            self._parse(read(member.offset, member.size))
        return 0, 0

    def label_ids(
        self,
        starts: NDArray[np.int64],  # (n,)
        counts: NDArray[np.int64],  # (n,) -1: no list
    ) -> NDArray[np.int32]:  # (sum of counts,)
        """The lists that `of` has told of, one after the other."""
        counts = np.maximum(counts, 0)
        before = np.cumsum(counts) - counts
        places = np.repeat(starts - before, counts) + np.arange(counts.sum())
        return np.array(self._label_ids, np.int32)[places]

    def _label_list(self, member: Member, read: Read) -> tuple[int, int]:
        """Its place in `_label_ids` and length, -1 for a list that cannot be."""
        text = read(member.offset, min(member.size, MAX_TEXT_BYTES))
        labels = parse_labels(text) if member.size <= MAX_TEXT_BYTES else None
        if labels is not None:
            self._label_ids.extend(labels)
            return len(self._label_ids) - len(labels), len(labels)
        key = (split_name(member.name) or ("",))[0]
        detail = f"{member.name} holds {text[:32]!r}, which are no integers from 0 to 2^31 - 1"
        self.notes.append(Note("bad_label", member.offset, detail, key))
        return 0, -1

    def _label(self, member: Member, read: Read) -> int:
        text = read(member.offset, min(member.size, 32))
        try:
            label = int(text)
        except ValueError:
            label = -1
        if 0 <= label < 1 << 63:
            return label
        key = (split_name(member.name) or ("",))[0]
        detail = f"{member.name} holds {text!r}, which is no integer label from 0 on"
        self.notes.append(Note("bad_label", member.offset, detail, key))
        return -1

    def _caption(self, payload: bytes) -> int:
        field = self.keys.caption_field
        try:
            if not field:
                return caption_hash(payload.decode("utf-8-sig"))
            value = self._parse(payload).get(field)
            captions = value if isinstance(value, list) else [value]
            return next((caption_hash(text) for text in captions if isinstance(text, str)), 0)
        except UnicodeError:  # what reads the sample says so
            return 0

    def _parse(self, payload: bytes) -> dict[str, Any]:
        try:
            tree = json.loads(payload)
        except (ValueError, RecursionError):
            return {}
        if not isinstance(tree, dict):
            return {}
        self.json_fields = self.json_fields or list(tree)[:100]
        return tree


def parse_labels(text: bytes) -> list[int] | None:
    """Integers with blanks between them, ascending and each once; None if it is anything else."""
    try:
        labels = sorted(set(map(int, text.split())))
    except ValueError:
        return None
    return labels if not labels or (labels[0] >= 0 and labels[-1] <= MAX_LABEL) else None


def find_ending(layout: Sequence[str], endings: str) -> int:
    """Place in `layout` of the first of `endings` ("jpg;png") that it has, else -1."""
    for ending in endings.split(";"):
        if ending in layout:
            return layout.index(ending)
    return -1


def _stored_size(member: Member, read: Read) -> tuple[int, int]:
    size = image_size(read(member.offset, min(member.size, _FIRST_BYTES)))
    if size == (0, 0) and member.size > _FIRST_BYTES:
        size = image_size(read(member.offset, min(member.size, _MORE_BYTES)))
    return size


def _cut_at_repeats(endings: Sequence[int]) -> list[tuple[int, ...]]:
    pieces: list[list[int]] = [[]]
    for ending in endings:
        if ending in pieces[-1]:
            pieces.append([])
        pieces[-1].append(ending)
    return [tuple(piece) for piece in pieces]


def _column(values: "array[int]") -> NDArray[np.int64]:
    return np.frombuffer(values, np.int64) if values else np.zeros(0, np.int64)


def _concatenate(pieces: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
