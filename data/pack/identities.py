"""A folder per identity -> shards with class numbers.

Memory: the names of the identities and the paths of one pool of images, nothing more an image.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.order import derive_key, permute
from data.pack.folder import IMAGE_ENDINGS, plain_key
from data.pack.images import image_part
from data.pack.limits import LIMITS, ShardLimits
from data.pack.numbering import NAMING, Naming, Numbering
from data.pack.writer import LeftOut, Packed, Progress, pack_iterable

POOL_IMAGES = 1 << 16
"""Images that are mixed with each other."""

_IDENTITIES, _POOL = 1, 2  # what a key is for


def pack_identities(
    folder: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    naming: Naming = NAMING,
    limits: ShardLimits = LIMITS,
    progress: Progress | None = None,
) -> Packed:
    """Write every jpg, png and webp of FOLDER/IDENTITY/..., in an order drawn by `seed`.

    Classes are numbered in the order of the sorted folder names (as torchvision's ImageFolder),
    after those of earlier packs. Identities are drawn in a random order and their images mixed in
    pools of 65,536. Files that are no images and identities without any are left out and told.
    Raises DataError when nothing is left.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DataError(f"{root}: no folder in there; identities are folders of images")
    numbering = Numbering(root, out, naming)
    for name in names:
        numbering.number(name, str(root))
    left_out = LeftOut()
    seen = np.zeros(len(names), bool)
    images = _iter_images(root, names, seed, seen, left_out)
    packed = pack_iterable(
        _iter_samples(_pooled(images, seed), numbering, left_out),
        out,
        max_samples=limits.max_samples,
        max_bytes=limits.max_bytes,
        total=_estimate(root, names),
        progress=progress,
    )
    numbering.save()
    return replace(packed, left_out=left_out.told(), num_identities=int(seen.sum()))


def _iter_images(
    root: Path, names: list[str], seed: int, seen: np.ndarray, left_out: LeftOut
) -> Iterator[tuple[str, str, Path]]:
    """(identity, key, path) of every image file, identity by identity."""
    num = np.array([len(names)])
    order = permute(np.arange(len(names)), num, derive_key(seed, _IDENTITIES))
    folder_keys = _distinct(plain_key(name) for name in names)
    for place in order.tolist():
        files = _image_files(root / names[place])
        if not files:
            left_out.add(f"{root / names[place]}: no image in there")
        seen[place] = bool(files)
        inside = [str(path.relative_to(root / names[place]).with_suffix("")) for path in files]
        keys = _distinct(plain_key(name) for name in inside)
        for key, path in zip(keys, files, strict=True):
            yield names[place], f"{folder_keys[place]}/{key}", path


def _iter_samples(
    images: Iterator[tuple[str, str, Path]], numbering: Numbering, left_out: LeftOut
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, key, path in images:
        try:
            part = image_part(path.read_bytes())
        except (DataError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            left_out.add(f"{path}: {why}")
        else:
            yield key, {**part, "cls": numbering.number(name, str(path))}


def _pooled(images: Iterator[tuple[str, str, Path]], seed: int) -> Iterator[tuple[str, str, Path]]:
    pool: list[tuple[str, str, Path]] = []
    number = 0
    for image in images:
        pool.append(image)
        if len(pool) == POOL_IMAGES:
            yield from _permuted(pool, seed, number)
            pool, number = [], number + 1
    yield from _permuted(pool, seed, number)


def _permuted(
    pool: list[tuple[str, str, Path]], seed: int, number: int
) -> Iterator[tuple[str, str, Path]]:
    size = np.array([max(1, len(pool))])
    for place in permute(np.arange(len(pool)), size, derive_key(seed, _POOL, number)).tolist():
        yield pool[place]


def _image_files(folder: Path) -> list[Path]:
    found = (Path(place, name) for place, _, files in os.walk(folder) for name in files)
    return sorted(path for path in found if path.suffix[1:].lower() in IMAGE_ENDINGS)


def _distinct(keys: Iterable[str]) -> list[str]:
    """`a.jpg` and `a.png` are two samples: the later key gets a number."""
    counts: dict[str, int] = {}
    found = []
    for key in keys:
        free = key
        while free in counts:
            counts[key] += 1
            free = f"{key}_{counts[key]}"
        counts[free] = 1
        found.append(free)
    return found


def _estimate(root: Path, names: list[str]) -> int:
    """About how many images there are, by some of the identities; for the progress."""
    some = names[:: max(1, len(names) // 64)]
    return round(sum(len(_image_files(root / name)) for name in some) * len(names) / len(some))
