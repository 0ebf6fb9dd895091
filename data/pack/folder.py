"""A folder of images with captions beside them, or of class folders -> shards."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.decode import image_size
from data.errors import DataError
from data.pack.limits import MAX_BYTES, MAX_SAMPLES
from data.pack.writer import LeftOut, Packed, Progress, pack_iterable

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")


def pack_folder(
    folder: str | Path,
    out: str | Path,
    *,
    captions: Literal["beside", "folder"] = "beside",
    seed: int = 0,
    max_samples: int = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> Packed:
    """Write every jpg, png and webp below `folder`, in an order drawn by `seed`.

    `captions="beside"`: `x.jpg` goes with `x.txt`, and with `x.json` and `x.cls` where there are
    such. `captions="folder"`: an image's caption is its folder's name with spaces for `_`, its
    label the folder's place among all. Images that do not open or have no caption are left out
    and told. Raises DataError when nothing is left.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    paths = sorted(p for p in root.rglob("*") if _ending(p) in IMAGE_ENDINGS and p.is_file())
    if not paths:
        raise DataError(f"{root}: no image ({', '.join(IMAGE_ENDINGS)}) anywhere below")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(paths))
    left_out = LeftOut()
    samples = _iter_samples(root, [paths[i] for i in order], captions, left_out)
    packed = pack_iterable(
        _unique(samples),
        out,
        max_samples=max_samples,
        max_bytes=max_bytes,
        total=len(paths),
        progress=progress,
    )
    return replace(packed, left_out=left_out.told())


def plain_key(name: str) -> str:
    """A member key from any path: dots would end it, so they become `_`."""
    return name.strip("/").replace(".", "_") or "_"


def _iter_samples(
    root: Path, paths: list[Path], captions: str, left_out: LeftOut
) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = {name: label for label, name in enumerate(sorted({p.parent.name for p in paths}))}
    for path in paths:
        image = path.read_bytes()
        name = path.parent.name
        texts = (
            {"txt": name.replace("_", " "), "cls": labels[name]}
            if captions == "folder"
            else _beside(path)
        )
        if image_size(image) == (0, 0):
            left_out.add(f"{path}: not an image")
        elif "txt" not in texts and "json" not in texts:
            left_out.add(f"{path}: no {path.stem}.txt or .json beside it")
        else:
            key = plain_key(str(path.relative_to(root).with_suffix("")))
            yield key, {_ending(path): image, **texts}


def _unique(
    samples: Iterator[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`a.jpg` and `a.png` are two samples: the later key gets a number."""
    seen: set[str] = set()
    for key, parts in samples:
        number, free = 1, key
        while free in seen:
            number += 1
            free = f"{key}_{number}"
        seen.add(free)
        yield free, parts


def _beside(path: Path) -> dict[str, Any]:
    found = {ending: path.with_suffix(f".{ending}") for ending in ("txt", "json", "cls")}
    return {ending: file.read_bytes() for ending, file in found.items() if file.is_file()}


def _ending(path: Path) -> str:
    return path.suffix[1:].lower()
