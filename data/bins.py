"""Verification sets in one file, `.bin`: a pickle of (encoded images, whether pairs are the same).

insightface's format for LFW, CFP-FP, AgeDB and their like: images 2i and 2i + 1 are pair i. A
pickle can call whatever it names, so none of the names is looked up: those that bytes and arrays
need stand for functions of this module, every other is refused. Encoded images stay in memory,
decoded ones for a batch at a time.
"""

import logging
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from data.augment import ImageTransform
from data.batch import Bad, EvalBatch
from data.decode import MAX_PIXELS, BadSample, decode_image
from data.errors import DataError

BIN_ENDING = ".bin"

_log = logging.getLogger("nsphere.data")


@dataclass(frozen=True)
class BinSet:
    """The content of a `.bin` file."""

    path: Path
    images: list[bytes]
    """2P encoded images; those of pair i are 2i and 2i + 1."""
    same: NDArray[np.bool_]  # (P,)

    @property
    def pairs(self) -> NDArray[np.int64]:  # (P, 2)
        """Sample ids, which are places in `images`."""
        return np.arange(2 * len(self.same), dtype=np.int64).reshape(-1, 2)


def load_bin(path: Path | str) -> BinSet:
    """Read a `.bin` file, written by Python 2 or 3, without running anything it names.

    Raises DataError for a file that is no such pickle, and naming whatever is in there besides
    bytes, arrays, lists, tuples and booleans.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _Unpickler(path, file).load()
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # noqa: BLE001 - garbage read as a pickle raises whatever it likes
        raise DataError(f"{path}: is no whole pickle of a verification set: {error!r}") from None
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise DataError(f"{path}: holds {_kind(content)}, not a pair (images, same)")
    images = [_image(path, number, item) for number, item in enumerate(_items(path, content[0]))]
    same = np.array([_flag(path, item) for item in _items(path, content[1])], bool)
    if len(images) != 2 * len(same) or not images:
        raise DataError(
            f"{path}: {len(images)} images and {len(same)} pairs: each pair has two, so the file "
            "is cut short or another format"
        )
    return BinSet(path, images, same)


def iter_bin_batches(
    content: BinSet,
    *,
    image_transform: ImageTransform,
    batch_size: int,
    rank: int,
    world_size: int,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[EvalBatch]:
    """Every image exactly once over the ranks, in order, as `data.loader.iter_eval_batches`."""
    total = len(content.images)
    ids = np.arange(rank * total // world_size, (rank + 1) * total // world_size)
    for numbers in np.array_split(ids, ceil(total / (world_size * batch_size))):
        yield _decode(content, numbers.tolist(), image_transform, max_pixels)


def _decode(
    content: BinSet, numbers: list[int], transform: ImageTransform, max_pixels: int
) -> EvalBatch:
    height, width = transform.size
    images = torch.empty((len(numbers), height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    good, bad = list[int](), list[Bad]()
    for number in numbers:
        try:
            transform(decode_image(content.images[number], max_pixels), None, images[len(good)])
        except BadSample as error:
            bad.append(Bad(str(content.path), str(number), str(error)))
            _log.warning("bad sample %s in %s: %s", number, content.path, error)
            continue
        good.append(number)
    return EvalBatch(
        images=images[: len(good)],
        ids=torch.tensor(good, dtype=torch.int64),
        labels=torch.full((len(good),), -1, dtype=torch.int64),
        texts=torch.empty((0, 0), dtype=torch.int64),
        text_owner=torch.empty(0, dtype=torch.int64),
        captions=[],
        keys=[f"{content.path.name}:{number}" for number in good],
        bad=tuple(bad),
    )


class _Unpickler(pickle.Unpickler):
    """Builds bytes, arrays of bytes, lists, tuples and numbers; every other name is an error."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        make = _MAKERS.get((module.replace("numpy.core", "numpy._core"), name))
        if make is None:
            _refuse(self._path, f"{module}.{name}")
        return _Call(make)

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse(self._path, f"a persistent object ({_kind(pid)})")


class _Call:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("it sets the state of a function")


class _Type:
    """numpy.dtype as far as bytes and booleans go."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Byte order and flags: one byte has none."""


class _Array:
    """numpy.ndarray of one-byte values, as the bytes it holds."""

    __slots__ = ("values",)

    def __init__(self, values: bytes = b"") -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        *_, shape, kind, _is_fortran, values = state
        _check_array(shape, kind, values)
        self.values = bytes(values)


def _check_array(shape: Any, kind: Any, values: Any) -> None:
    if not isinstance(kind, _Type) or not isinstance(values, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array that is not of uint8 or bool")
    if math.prod(shape) != len(values):
        raise pickle.UnpicklingError(f"an array of shape {shape} with {len(values)} bytes")


def _new_array(*_args: Any) -> _Array:
    return _Array()


def _array_of_buffer(values: Any, kind: Any, shape: Any, _order: Any) -> _Array:
    _check_array(shape, kind, values)
    return _Array(bytes(values))


def _new_type(name: Any, *_args: Any) -> _Type:
    text = name.decode("ascii") if isinstance(name, bytes) else name
    if text not in ("u1", "|u1", "uint8", "b1", "|b1", "bool"):
        raise pickle.UnpicklingError(f"an array of {text!r}, not of uint8 or bool")
    return _Type()


def _scalar(kind: Any, value: Any) -> bool:
    _check_array((1,), kind, value)
    return bool(value[0])


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes for Python 2 to read.
    if encoding not in ("latin1", b"latin1") or not isinstance(text, str):
        raise pickle.UnpicklingError(f"text to be encoded as {encoding!r}")
    return text.encode("latin1")


def _never(*_args: Any) -> NoReturn:
    raise pickle.UnpicklingError("it calls numpy.ndarray itself")


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _new_type,
    ("numpy", "ndarray"): _never,  # named as the kind of array to make, not called
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array_of_buffer,
}


def _items(path: Path, value: Any) -> list[Any]:
    if isinstance(value, _Array):
        return list(value.values)
    if not isinstance(value, (list, tuple)):
        _refuse(path, _kind(value))
    return list(value)


def _image(path: Path, number: int, value: Any) -> bytes:
    if isinstance(value, _Array):
        return value.values
    if not isinstance(value, (bytes, bytearray)):
        _refuse(path, f"{_kind(value)} as image {number}")
    return bytes(value)


def _flag(path: Path, value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        _refuse(path, f"{_kind(value)} where it should say whether a pair is the same")
    return bool(value)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__.lstrip('_').lower()}"


def _refuse(path: Path, what: str) -> NoReturn:
    raise DataError(
        f"{path}: holds {what}, which is refused: a verification set is bytes, arrays, lists, "
        "tuples and booleans, and a pickle that names anything else may do anything"
    )
