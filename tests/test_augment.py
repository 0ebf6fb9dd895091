"""The evaluation transform against open_clip's; augmentation keyed, and against torchvision's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from open_clip.transform import image_transform
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from data.augment import ImageTransform, KeyedRng, move_box, random_box, sample_rng
from data.config import AugmentConfig

SHAPES = [(375, 500), (500, 375), (64, 64), (224, 224), (300, 301), (100, 640), (31, 17), (1, 1)]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noisy = image.astype(int) + draw.integers(-9, 10, image.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def by_open_clip(
    image: np.ndarray, size: int | tuple[int, int], mode: str, fill: int
) -> np.ndarray:
    transform = image_transform(
        size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, fill_color=fill
    )
    return (transform(Image.fromarray(image)) * 255).round().numpy().astype(int)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [224, (224, 224), (96, 160), (160, 96)])
def test_the_evaluation_transform_is_open_clips(shape, mode, size):
    image = photo(*shape)
    ours = ImageTransform(size, resize_mode=mode, fill=37)(image)
    height, width = (size, size) if isinstance(size, int) else size
    assert ours.dtype == torch.uint8 and ours.shape == (3, height, width)
    apart = np.abs(ours.numpy().astype(int) - by_open_clip(image, size, mode, 37))
    assert (apart == 0).mean() > 0.99
    assert apart.max() <= 2 and (apart > 1).mean() < 3e-5  # enlarging rounds twice


@pytest.mark.parametrize("config", [None, AugmentConfig(flip=0.5)])
def test_a_given_place_is_filled_in_any_memory_layout(config):
    image = photo(300, 400)
    transform = ImageTransform((96, 80), config)
    wanted = transform(image, sample_rng(0, 0, 0, "image"))
    for layout in (torch.contiguous_format, torch.channels_last):
        batch = torch.zeros(3, 3, 96, 80, dtype=torch.uint8).contiguous(memory_format=layout)
        got = transform(image, sample_rng(0, 0, 0, "image"), batch[1])
        assert got.data_ptr() == batch[1].data_ptr()
        assert torch.equal(batch[1], wanted)
        assert not batch[0].any() and not batch[2].any()


def test_the_image_is_left_as_it_was_and_may_be_read_only():
    everything = AugmentConfig(
        flip=1, rotate=20, color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=1, blur=1, erase=1
    )
    for config in (None, AugmentConfig(scale=(1, 1), ratio=(1, 1)), everything):
        image = photo(64, 64)
        before = image.copy()
        image.flags.writeable = False
        ImageTransform(64, config)(image, sample_rng(0, 0, 0, "image"))
        np.testing.assert_array_equal(image, before)


def test_training_needs_a_generator():
    with pytest.raises(TypeError, match="give it the sample's generator"):
        ImageTransform(32, AugmentConfig())(photo(40, 40))


# -- keyed draws


def test_draws_depend_on_each_part_of_the_key_and_on_nothing_else():
    keys = [(0, 0, 0, "image"), (1, 0, 0, "image"), (0, 1, 0, "image"), (0, 0, 1, "image")]
    keys += [(0, 0, 0, "caption"), (1 << 63, 0, 0, "image"), (0, 0, 1 << 40, "image")]
    draws = [tuple(sample_rng(*key).random(50)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert [tuple(sample_rng(*key).random(50)) for key in keys] == draws
    assert not set(draws[0]) & set(draws[3])


def test_a_keyed_rng_gives_the_same_draws_in_any_order_of_samples():
    keyed = KeyedRng(7, "image")
    keyed(3, 1).integers(0, 10, 3, dtype=np.int32)  # leaves half a word behind
    for epoch, sample in [(0, 5), (2, 4), (0, 5), (1, 0)]:
        ours = keyed(epoch, sample)
        wanted = sample_rng(7, epoch, sample, "image")
        for _ in range(3):
            assert ours.integers(0, 1000, dtype=np.int32) == wanted.integers(
                0, 1000, dtype=np.int32
            )
            assert ours.normal() == wanted.normal()


def test_the_draws_are_the_same_for_ever():
    # A change of these numbers breaks the exact resume of every run that was started before.
    assert sample_rng(1, 2, 3, "image").random(3).tolist() == GOLDEN_DRAWS
    config = AugmentConfig(scale=(0.1, 0.8))
    boxes = [random_box((375, 500), config, sample_rng(0, 0, i, "image")) for i in range(3)]
    assert boxes == GOLDEN_BOXES


GOLDEN_DRAWS = [0.6891556291594976, 0.1704124367335491, 0.24019757380431472]
GOLDEN_BOXES = [(14, 71, 277, 260), (87, 303, 158, 135), (132, 95, 183, 199)]


# -- crops


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0), (1.0, 1.0)])
def test_a_box_lies_in_the_image_with_the_area_and_ratio_asked_for(shape, scale):
    config, keyed = AugmentConfig(scale=scale), KeyedRng(0, "image")
    for sample in range(200):
        top, left, height, width = random_box(shape, config, keyed(0, sample))
        assert height > 0 and width > 0
        assert 0 <= top <= shape[0] - height and 0 <= left <= shape[1] - width
        if min(shape) >= 224 and max(shape) / min(shape) < 1.3:
            assert scale[0] * 0.98 <= height * width / (shape[0] * shape[1]) <= scale[1]
            assert 0.74 <= width / height <= 1.35


def test_boxes_are_distributed_as_torchvisions():
    shape, config, num = (375, 500), AugmentConfig(scale=(0.2, 1.0)), 4000
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, list(config.scale), list(config.ratio))
            for _ in range(num)
        ]
    )
    keyed = KeyedRng(0, "image")
    ours = np.array([random_box(shape, config, keyed(0, sample)) for sample in range(num)])
    for column in range(4):
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            one, two = np.quantile(ours[:, column], share), np.quantile(theirs[:, column], share)
            assert abs(one - two) < 0.04 * max(shape)


def test_a_crop_is_pillows_resize_of_the_box():
    image, config = photo(375, 500), AugmentConfig(scale=(0.3, 0.9))
    for sample in range(5):
        top, left, height, width = random_box((375, 500), config, sample_rng(0, 0, sample, "x"))
        box = Image.fromarray(image[top : top + height, left : left + width])
        wanted = np.asarray(box.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
        ours = ImageTransform(96, config)(image, sample_rng(0, 0, sample, "x")).permute(1, 2, 0)
        assert np.abs(ours.numpy() - wanted).max() <= 1


# -- the other augmentations; the whole image is the crop

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def augmented(image: np.ndarray, sample: int = 0, **options: object) -> torch.Tensor:
    shape = image.shape[1] / image.shape[0]
    config = AugmentConfig(scale=(1.0, 1.0), ratio=(shape, shape), **options)
    return ImageTransform(image.shape[:2], config)(image, sample_rng(0, 0, sample, "image"))


def planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


@pytest.mark.parametrize("option", ["flip", "grayscale", "erase"])
def test_a_probability_is_the_share_of_images(option):
    image = photo(16, 16)
    plain = planes(image)
    assert all(torch.equal(augmented(image, i, **{option: 0.0}), plain) for i in range(20))
    assert all(not torch.equal(augmented(image, i, **{option: 1.0}), plain) for i in range(20))
    changed = sum(not torch.equal(augmented(image, i, **{option: 0.3}), plain) for i in range(600))
    assert abs(changed / 600 - 0.3) < 0.06


def test_flip_and_grey_are_exact():
    image = photo(40, 40)
    assert torch.equal(augmented(image, flip=1.0), planes(image[:, ::-1]))
    grey = augmented(image, grayscale=1.0)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    wanted = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    assert np.abs(grey[0].numpy() - wanted).max() <= 1


def test_rotation_is_torchvisions_inside_and_repeats_the_edge_outside():
    image = photo(96, 128)
    for sample in range(4):
        rng = sample_rng(0, 0, sample, "image")
        random_box((96, 128), AugmentConfig(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3)), rng)
        degrees = rng.uniform(-30, 30)
        ours = augmented(image, sample, rotate=30.0)
        bilinear = tv.InterpolationMode.BILINEAR
        wanted = tv.rotate(planes(image).float(), degrees, interpolation=bilinear)
        inside = tv.rotate(torch.ones(1, 96, 128), degrees, interpolation=bilinear)[0] > 0.9999
        assert 0.5 < inside.float().mean() < 1
        assert (ours.float() - wanted)[:, inside].abs().max() <= 1.0
        rows, columns = planes(image)[:, [0, -1]], planes(image)[:, :, [0, -1]]
        edges = torch.cat([rows.flatten(1), columns.flatten(1)], dim=1)
        outside = ours[:, ~inside]
        assert (outside >= edges.amin(1, keepdim=True)).all()
        assert (outside <= edges.amax(1, keepdim=True)).all()
    white = np.full((32, 32, 3), 255, np.uint8)
    assert (augmented(white, rotate=45.0) == 255).all()


def test_jitter_is_torchvisions_in_a_keyed_order():
    image = photo(48, 48)
    seen = set()
    for sample in range(8):
        options = {"color_jitter": (0.4, 0.3, 0.2, 0.1), "color_jitter_probability": 1.0}
        ours = augmented(image, sample, **options)
        rng = sample_rng(0, 0, sample, "image")
        random_box((48, 48), AugmentConfig(**WHOLE), rng)
        rng.random()  # whether to jitter
        wanted = planes(image)
        order = rng.permutation(4).tolist()
        for which in order:
            low, high = [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)][which]
            name = ["brightness", "contrast", "saturation", "hue"][which]
            wanted = getattr(tv, f"adjust_{name}")(wanted, rng.uniform(low, high))
        assert torch.equal(ours, wanted)
        seen.add(tuple(order))
    assert len(seen) > 3
    never = {"color_jitter": (0.4, 0.3, 0.2, 0.1), "color_jitter_probability": 0.0}
    assert torch.equal(augmented(image, **never), planes(image))


def test_blur_is_a_gaussian_scaled_to_the_size():
    image = photo(112, 112)
    for sample in range(3):
        rng = sample_rng(0, 0, sample, "image")
        random_box((112, 112), AugmentConfig(**WHOLE), rng)
        rng.random()
        sigma = rng.uniform(0.1, 2.0) * 112 / 224
        wanted = tv.gaussian_blur(planes(image).float(), [25, 25], [sigma, sigma])
        inner = (slice(None), slice(12, -12), slice(12, -12))
        ours = augmented(image, sample, blur=1.0).float()
        assert (ours - wanted)[inner].abs().max() <= 1.0
    assert augmented(photo(3, 3), blur=1.0).shape == (3, 3, 3)
    num_blurred = 0
    for sample in range(200):
        is_blurred = sample_rng(0, 0, sample, "image").random(41)[40] < 0.3  # after the box
        wanted = augmented(image, sample, blur=1.0) if is_blurred else planes(image)
        assert torch.equal(augmented(image, sample, blur=0.3), wanted)
        num_blurred += is_blurred
    assert 40 < num_blurred < 80


def test_an_erased_rectangle_holds_its_mean_color():
    image = photo(80, 100)
    for sample in range(10):
        erased = augmented(image, sample, erase=1.0)
        changed = (erased != planes(image)).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        region = erased[:, box[0], box[1]].float()
        assert (region == region[:, :1, :1]).all()
        mean = planes(image)[:, box[0], box[1]].float().mean(dim=(1, 2))
        assert (region[:, 0, 0] - mean).abs().max() <= 2
        assert 0.015 < region[0].numel() / 8000 < 0.21


def test_everything_together_is_a_function_of_the_key():
    config = AugmentConfig(
        scale=(0.3, 1.0), flip=0.5, rotate=10, color_jitter=(0.4, 0.4, 0.4, 0.1),
        grayscale=0.2, blur=0.3, erase=0.3,
    )  # fmt: skip
    image, transform, keyed = photo(90, 120), ImageTransform(64, config), KeyedRng(3, "image")
    first = [transform(image, keyed(0, sample)).clone() for sample in range(20)]
    for sample in reversed(range(20)):
        assert torch.equal(transform(image, sample_rng(3, 0, sample, "image")), first[sample])
    assert all(not torch.equal(first[0], other) for other in first[1:])


# -- faces: the geometry of evaluation, framing, AdaFace's three


def face(image: np.ndarray, sample: int = 0, size: object = None, **options: object):
    config = AugmentConfig(crop=False, **options)
    transform = ImageTransform(size or image.shape[:2], config, resize_mode="squash")
    return transform(image, sample_rng(0, 0, sample, "image"))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(112, 112), (112, 92), (70, 200)])
def test_without_a_crop_training_sees_what_evaluation_sees(shape, mode):
    image = photo(*shape)
    plain = ImageTransform(64, resize_mode=mode)(image)
    trained = ImageTransform(64, AugmentConfig(crop=False), resize_mode=mode)
    assert torch.equal(trained(image, sample_rng(0, 0, 0, "image")), plain)
    flipped = ImageTransform(64, AugmentConfig(crop=False, flip=1.0), resize_mode=mode)
    assert torch.equal(flipped(image, sample_rng(0, 0, 0, "image")), plain.flip(-1))


def test_a_shift_moves_whole_pixels_and_repeats_the_edge():
    image = photo(40, 50)
    moves = set()
    for sample in range(60):
        shifted = face(image, sample, shift=0.1)
        rows = np.arange(40)[:, None] + np.arange(-4, 5)[None]
        columns = np.arange(50)[:, None] + np.arange(-5, 6)[None]
        found = [
            (down - 4, right - 5)
            for down in range(9)
            for right in range(11)
            if np.array_equal(
                shifted.permute(1, 2, 0).numpy(),
                image[rows[:, down].clip(0, 39)][:, columns[:, right].clip(0, 49)],
            )
        ]
        assert len(found) == 1
        moves.add(found[0])
    assert {abs(down) for down, _ in moves} == set(range(5)) and len(moves) > 30


def test_a_zoom_is_a_resized_box_round_the_middle():
    image = photo(60, 60)
    heights = []
    for sample in range(200):
        config = AugmentConfig(crop=False, zoom=0.25)
        top, left, height, width = move_box(
            (0, 0, 60, 60), config, sample_rng(0, 0, sample, "image")
        )
        assert height == width and abs(top + height / 2 - 30) <= 0.5 and top == left
        heights.append(height)
        if sample < 20 and height <= 60:
            box = (left, top, left + width, top + height)
            wanted = Image.fromarray(image).resize((60, 60), Image.Resampling.BICUBIC, box=box)
            ours = face(image, sample, zoom=0.25).permute(1, 2, 0).numpy()
            assert np.abs(ours.astype(int) - np.asarray(wanted)).max() <= 2
    assert min(heights) >= 48 and max(heights) <= 75
    assert abs((np.array(heights) > 60).mean() - 0.5) < 0.12  # larger as often as smaller


def test_shift_and_zoom_move_the_random_crop_too():
    image = photo(80, 100)
    for sample in range(20):
        rng = sample_rng(0, 0, sample, "image")
        config = AugmentConfig(scale=(0.2, 0.4), shift=0.2, zoom=0.1)
        box = random_box((80, 100), config, rng)
        moved = move_box(box, config, rng)
        for side in range(2):
            middle = moved[side] + moved[side + 2] / 2 - box[side] - box[side + 2] / 2
            assert abs(middle) <= 0.2 * box[side + 2] + 1.0
        rng = sample_rng(0, 0, sample, "image")
        assert ImageTransform(64, config)(image, rng).shape == (3, 64, 64)


def test_what_is_erased_outside_is_black_and_the_box_stays_in_place():
    image = photo(112, 112).clip(1, 255)
    areas = []
    for sample in range(100):
        kept = face(image, sample, erase_outside=1.0)
        inside = (kept != 0).any(dim=0)
        rows, columns = inside.any(dim=1).nonzero(), inside.any(dim=0).nonzero()
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        assert inside[box].all() and inside.sum() == inside[box].numel()
        assert torch.equal(kept[:, box[0], box[1]], planes(image)[:, box[0], box[1]])
        areas.append(inside.float().mean().item())
    assert 0.19 < min(areas) < 0.35 and 0.8 < max(areas) <= 1.0
    assert np.ptp([face(image, 1, erase_outside=1.0, erase_outside_scale=(1, 1)).numpy()]) > 0


def test_low_resolution_takes_detail_away_and_keeps_the_layout():
    image = photo(112, 112)
    grain = lambda pixels: pixels.float().diff(dim=1).abs().mean().item()  # noqa: E731
    tints = planes(image).float().mean(dim=(1, 2))
    shares = []
    for sample in range(80):
        low = face(image, sample, low_resolution=1.0)
        assert low.shape == (3, 112, 112) and low.dtype == torch.uint8
        assert (low.float().mean(dim=(1, 2)) - tints).abs().max() < 4
        rough = F.avg_pool2d(low.float(), 28) - F.avg_pool2d(planes(image).float(), 28)
        assert rough.abs().max() < 20, "the picture lies where it lay"
        shares.append(grain(low) / grain(planes(image)))
    assert min(shares) < 0.6 and max(shares) > 0.8
    tiny = face(image, 0, low_resolution=1.0, low_resolution_scale=(0.05, 0.05))
    assert len(torch.unique(tiny.flatten(1), dim=1).T) > 1
    assert face(photo(3, 3), low_resolution=1.0, low_resolution_scale=(0.1, 0.1)).shape == (3, 3, 3)


@pytest.mark.parametrize("option", ["erase_outside", "low_resolution"])
def test_a_face_augmentations_probability_is_the_share_of_images(option):
    image = photo(48, 48)
    assert all(torch.equal(face(image, i, **{option: 0.0}), planes(image)) for i in range(20))
    share = {f"{option}_scale": (0.2, 0.5)}
    changed = [
        not torch.equal(face(image, i, **{option: 0.2}, **share), planes(image)) for i in range(500)
    ]
    assert abs(np.mean(changed) - 0.2) < 0.06


def test_adafaces_set_is_keyed_and_off_by_default():
    config = AugmentConfig(
        crop=False, flip=0.5, erase_outside=0.5, low_resolution=0.5, shift=0.03, zoom=0.05,
        rotate=5, color_jitter=(0.5, 0.5, 0.5, 0.0), color_jitter_probability=0.5,
    )  # fmt: skip
    image, keyed = photo(112, 112), KeyedRng(3, "image")
    transform = ImageTransform(112, config, resize_mode="squash")
    first = [transform(image, keyed(0, sample)).clone() for sample in range(20)]
    for sample in reversed(range(20)):
        assert torch.equal(transform(image, sample_rng(3, 0, sample, "image")), first[sample])
    assert torch.equal(face(image), planes(image))


@pytest.mark.parametrize("name", ["scale", "erase_outside_scale", "low_resolution_scale"])
@pytest.mark.parametrize("value", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_a_share_that_is_no_range_is_an_error(name, value):
    with pytest.raises(ValueError, match=rf"{name} = .* is no range of shares"):
        AugmentConfig(**{name: value})
