"""Decoded images -> the model's input size in uint8; training draws come from a keyed generator.

Normalisation to floats happens on the device, in the model (`trainer/models`).
"""

import hashlib
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from data.config import AugmentConfig

ResizeMode = Literal["shortest", "longest", "squash"]
Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

_WORD = (1 << 64) - 1
_BOX_TRIES = 10
_ERASED_AREA = (0.02, 0.2)
_ERASED_RATIO = (0.3, 3.3)
# AdaFace's five of OpenCV, area averaging standing for antialiased bilinear.
_INTERPOLATIONS = (
    ("nearest-exact", False),
    ("bilinear", False),
    ("bilinear", True),
    ("bicubic", False),
    ("bicubic", True),
)


class KeyedRng:
    """Random draws that depend on (seed, purpose, epoch, sample id) and on nothing else.

    A call re-keys one generator, which costs a seventh of making one: its result is valid until
    the next call. Philox (Salmon et al. 2011): the seed and the purpose are its key, the epoch and
    the sample id the high words of its counter, so no two samples share a draw.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
        key = np.array([seed & _WORD, int.from_bytes(digest, "big")], np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.zeros(4, np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._state = self._bits.state

    def __call__(self, epoch: int, sample_id: int) -> np.random.Generator:
        """The generator of one sample in one epoch, at its start."""
        counter = self._state["state"]["counter"]
        counter[2], counter[3] = epoch & _WORD, sample_id & _WORD
        self._bits.state = self._state
        return self._generator


def sample_rng(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """A generator of its own for one sample; `KeyedRng` gives the same draws in a loop."""
    return KeyedRng(seed, purpose)(epoch, sample_id)


class ImageTransform:
    """Brings a decoded image to `size`; with an AugmentConfig it also augments, by keyed draws.

    Without one it equals open_clip's evaluation transform before its normalisation: bicubic with
    antialias, by resize mode `shortest` (shorter side to size, center crop), `longest` (longer side
    to size, centered on `fill`) or `squash` (both sides to size). Training crops in every mode,
    unless the config's `crop` is off.
    """

    def __init__(
        self,
        size: int | tuple[int, int],  # (height, width)
        config: AugmentConfig | None = None,
        *,
        resize_mode: ResizeMode = "shortest",
        fill: int = 0,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.config = config
        self.resize_mode = resize_mode
        self.fill = fill

    def __call__(
        self,
        image: np.ndarray,  # (h, w, 3) uint8
        rng: np.random.Generator | None = None,
        out: Tensor | None = None,  # (3, H, W) uint8
    ) -> Tensor:  # (3, H, W) uint8
        """The image at the model's size, in `out` when that is given.

        Fastest where `out` lies in channels-last memory, as the result without it does.
        """
        source = torch.from_numpy(_contiguous(self._crop(image, rng)))[None].permute(0, 3, 1, 2)
        pixels = (source if source.shape[2:] == self.size else self._fit(source))[0]
        if self.config is not None:
            pixels = _augment(pixels, self.config, _given(rng))
        return pixels.clone() if out is None else out.copy_(pixels)

    def _crop(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if self.config is None:
            return image
        box = 0, 0, image.shape[0], image.shape[1]
        if self.config.crop:
            box = random_box(image.shape[:2], self.config, _given(rng))
        if self.config.shift or self.config.zoom:
            box = move_box(box, self.config, _given(rng))
        return _cut(image, box)

    def _fit(self, source: Tensor) -> Tensor:  # (1, 3, h, w) -> (1, 3, H, W)
        if (self.config is not None and self.config.crop) or self.resize_mode == "squash":
            return _resize(source, self.size)
        source = _resize(source, self._kept_ratio(source.shape[2], source.shape[3]))
        return _center(source, self.size, self.fill)

    def _kept_ratio(self, height: int, width: int) -> tuple[int, int]:
        ratios = (height / self.size[0], width / self.size[1])
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            # torchvision's Resize(int) cuts the longer side down where the others round it.
            short, long = self.size[0], int(self.size[0] * max(height, width) / min(height, width))
            return (short, long) if height <= width else (long, short)
        ratio = min(ratios) if self.resize_mode == "shortest" else max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def random_box(
    shape: tuple[int, ...],  # (h, w) of the image
    config: AugmentConfig,
    rng: np.random.Generator,
) -> Box:
    """Top, left, height, width of a random crop, distributed as torchvision's RandomResizedCrop."""
    height, width = shape
    least, most = (height * width * share for share in config.scale)
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    # All draws at once: a wide image refuses most boxes, and a call costs more than its numbers.
    for area_draw, ratio_draw, top_draw, left_draw in rng.random((_BOX_TRIES, 4)).tolist():
        area = least + (most - least) * area_draw
        ratio = math.exp(low + (high - low) * ratio_draw)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    ratio = min(max(width / height, config.ratio[0]), config.ratio[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def move_box(box: Box, config: AugmentConfig, rng: np.random.Generator) -> Box:
    """The box moved by up to `shift` of its sides and grown or shrunk by up to `zoom`."""
    top, left, height, width = box
    size_draw, down, right = (2 * rng.random(3) - 1).tolist()
    size = (1 + config.zoom) ** size_draw
    h, w = max(1, round(height * size)), max(1, round(width * size))
    middle = top + height * (0.5 + config.shift * down), left + width * (0.5 + config.shift * right)
    return round(middle[0] - h / 2), round(middle[1] - w / 2), h, w


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    """The pixels of a box; beyond the image they repeat its edge."""
    top, left, height, width = box
    if min(top, left) >= 0 and top + height <= image.shape[0] and left + width <= image.shape[1]:
        return image[top : top + height, left : left + width]
    rows = np.arange(top, top + height).clip(0, image.shape[0] - 1)
    columns = np.arange(left, left + width).clip(0, image.shape[1] - 1)
    return image.take(rows, axis=0).take(columns, axis=1)


def _resize(source: Tensor, size: tuple[int, int]) -> Tensor:  # (1, 3, h, w) -> (1, 3, *size)
    if source.shape[2:] == size:
        return source
    # On uint8 in channels-last memory this is the vectorised path, equal to PIL's to one level.
    return F.interpolate(source, size, mode="bicubic", antialias=True, align_corners=False)


def _center(source: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    short_h, short_w = (
        max(0, want - have) for want, have in zip(size, source.shape[2:], strict=True)
    )
    if short_h or short_w:
        sides = [short_w // 2, (short_w + 1) // 2, short_h // 2, (short_h + 1) // 2]
        source = F.pad(source, sides, value=fill)
    top, left = (
        round((have - want) / 2) for want, have in zip(size, source.shape[2:], strict=True)
    )
    return source[:, :, top : top + size[0], left : left + size[1]]


def _augment(pixels: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    if config.flip and rng.random() < config.flip:
        pixels = pixels.flip(-1)
    if config.rotate:
        pixels = _rotate(pixels, rng.uniform(-config.rotate, config.rotate))
    if config.erase_outside and rng.random() < config.erase_outside:
        pixels = _erase_outside(pixels, config.erase_outside_scale, rng)
    if config.low_resolution and rng.random() < config.low_resolution:
        pixels = _lower_resolution(pixels, config.low_resolution_scale, rng)
    if any(config.color_jitter) and rng.random() < config.color_jitter_probability:
        pixels = _jitter(pixels, config.color_jitter, rng)
    if config.grayscale and rng.random() < config.grayscale:
        pixels = tv.rgb_to_grayscale(pixels, num_output_channels=3)
    if config.blur and rng.random() < config.blur:
        pixels = _blur(pixels, rng.uniform(0.1, 2.0) * min(pixels.shape[1:]) / 224)
    if config.erase and rng.random() < config.erase:
        pixels = _erase(pixels, rng)
    return pixels


def _rotate(pixels: Tensor, degrees: float) -> Tensor:
    # Corners that turn in repeat the nearest edge: black ones would tell the angle.
    height, width = pixels.shape[1:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor(
        [[[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]]
    )
    grid = F.affine_grid(turn, [1, 3, height, width], align_corners=False)
    turned = F.grid_sample(
        pixels[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return _to_uint8(turned[0])


def _jitter(
    pixels: Tensor, strength: tuple[float, float, float, float], rng: np.random.Generator
) -> Tensor:
    # torchvision's ColorJitter: factors around 1, hue a shift in turns, in random order.
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for which in rng.permutation(4):
        if width := strength[which]:
            low = -width if which == 3 else max(0.0, 1 - width)
            high = width if which == 3 else 1 + width
            pixels = adjust[which](pixels, rng.uniform(low, high))
    return pixels


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    reach = min(math.ceil(3 * sigma), min(pixels.shape[1:]) - 1)
    at = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.softmax(-(at**2) / (2 * sigma**2), dim=0)
    rows = F.pad(pixels[:, None].float(), (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(F.conv2d(rows, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return _to_uint8(rows[:, 0])


def _erase(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    box = AugmentConfig(scale=_ERASED_AREA, ratio=_ERASED_RATIO)
    top, left, height, width = random_box(tuple(pixels.shape[1:]), box, rng)
    erased = pixels.clone()
    region = erased[:, top : top + height, left : left + width]
    region[:] = _to_uint8(region.float().mean(dim=(1, 2), keepdim=True))
    return erased


def _erase_outside(pixels: Tensor, scale: tuple[float, float], rng: np.random.Generator) -> Tensor:
    shape = tuple(pixels.shape[1:])
    top, left, height, width = random_box(shape, AugmentConfig(scale=scale), rng)
    kept = torch.zeros_like(pixels)
    box = (slice(None), slice(top, top + height), slice(left, left + width))
    kept[box] = pixels[box]
    return kept


def _lower_resolution(
    pixels: Tensor, scale: tuple[float, float], rng: np.random.Generator
) -> Tensor:
    height, width = pixels.shape[1:]
    share = rng.uniform(*scale)
    size = max(1, int(share * height)), max(1, int(share * width))
    for target in (size, (height, width)):
        mode, antialias = _INTERPOLATIONS[int(rng.integers(len(_INTERPOLATIONS)))]
        exact = {} if mode == "nearest-exact" else {"antialias": antialias, "align_corners": False}
        pixels = F.interpolate(pixels[None], target, mode=mode, **exact)[0]
    return pixels


def _to_uint8(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)


def _contiguous(image: np.ndarray) -> np.ndarray:
    usable = image.flags.c_contiguous and image.flags.writeable  # torch warns of read-only arrays
    return image if usable else image.copy()


def _given(rng: np.random.Generator | None) -> np.random.Generator:
    if rng is None:
        raise TypeError("a training ImageTransform draws: give it the sample's generator as rng")
    return rng
