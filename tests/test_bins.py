"""`.bin` sets: every way they were ever pickled is read, and nothing that they name is run."""

import collections
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tars import picture

from data.augment import ImageTransform
from data.bins import iter_bin_batches, load_bin
from data.decode import decode_image
from data.errors import DataError

SAME = [True, False, True]
IMAGES = [picture(number) for number in range(6)]
TRANSFORM = ImageTransform(16, None, resize_mode="squash")


def python2(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """What Python 2's pickle writes: `str` opcodes, which Python 3's never does."""
    if protocol == 0:
        strings = b"".join(b"S" + repr(item)[1:].encode() + b"\na" for item in images)
        flags = b"".join(b"I0%d\na" % flag for flag in same)
        return b"((l" + strings + b"(l" + flags + b"t."
    strings = b"".join(
        (b"U" + bytes([len(item)]) if len(item) < 256 else b"T" + struct.pack("<I", len(item)))
        + item
        for item in images
    )
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in same)
    return b"\x80\x02](" + strings + b"e](" + flags + b"e\x86."


def arrays_of_numpy_1() -> bytes:
    """Arrays and booleans under the module names of numpy 1."""
    images = [np.frombuffer(image, np.uint8) for image in IMAGES]
    content = pickle.dumps((images, [np.bool_(flag) for flag in SAME]), 2)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


WAYS = {
    "python 2, protocol 0": python2(IMAGES, SAME, 0),
    "python 2, protocol 2": python2(IMAGES, SAME, 2),
    **{f"protocol {p}": pickle.dumps((IMAGES, SAME), p) for p in range(6)},
    **{
        f"arrays, protocol {p}": pickle.dumps(
            ([np.frombuffer(image, np.uint8) for image in IMAGES], np.array(SAME)), p
        )
        for p in range(6)
    },
    "writable arrays": pickle.dumps(([np.frombuffer(i, np.uint8).copy() for i in IMAGES], SAME), 5),
    "numpy 1": arrays_of_numpy_1(),
    "lists and ones": pickle.dumps([tuple(IMAGES), (1, 0, 1)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_one_is_read(tmp_path, way):
    (tmp_path / "x.bin").write_bytes(WAYS[way])
    content = load_bin(tmp_path / "x.bin")
    assert content.images == IMAGES
    assert content.same.tolist() == SAME and content.same.dtype == bool
    assert content.pairs.tolist() == [[0, 1], [2, 3], [4, 5]]


class Attack:
    """Unpickled plainly, it calls `function(*args)`."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make a file, and what must be named."""
    shell = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    plain = {
        "posix.system": Attack(os.system, shell),
        "builtins.eval": Attack(eval, code),
        "builtins.getattr": Attack(getattr, [], "append"),
        "collections.OrderedDict": collections.OrderedDict(a=1),
    }
    found = {name: (pickle.dumps(([item], [True])), name) for name, item in plain.items()}
    found["by position"] = pickle.dumps((IMAGES, [Attack(os.system, shell)])), "posix.system"
    found["protocol 0"] = b"cos\nsystem\n(S'" + shell.encode() + b"'\ntR.", "os.system"
    found["stack global"] = (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c"
        + bytes([len(shell)])
        + shell.encode()
        + b"\x85R.",
        "posix.system",
    )
    found["old instance"] = (
        b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        "os.system",
    )
    found["dotted"] = (
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
        "numpy.ndarray.dumps",
    )
    found["persistent"] = b"Pwhatever\n.", "persistent object"
    found["extension"] = b"\x80\x02\x82\x01.", "no whole pickle"
    return found


def test_attacks_are_refused_by_name_and_nothing_runs(tmp_path):
    canary = tmp_path / "canary"
    assert len(attacks(canary)) >= 9
    for content, named in attacks(canary).values():
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(DataError, match=named.replace(".", r"\.")) as error:
            load_bin(tmp_path / "x.bin")
        assert str(tmp_path / "x.bin") in str(error.value)
        assert not canary.exists()
    pickle.loads(attacks(canary)["protocol 0"][0])
    assert canary.exists(), "the attack would have worked"


def test_what_stands_for_numpy_cannot_be_bent(tmp_path):
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n"
    bent = {
        "state of a function": reconstruct + b"}S'x'\nS'y'\nsb.",
        "made as a class": b"\x80\x02" + reconstruct + b")\x81.",
        "called itself": b"cnumpy\nndarray\n(I10\ntR.",
        "object array": pickle.dumps(([np.array([{}], object)], [True])),
        "floats": pickle.dumps(([np.zeros(3)], [True])),
        "other encoding": b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        "huge memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    }
    for content in bent.values():
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.bin: (is no whole pickle|holds)"):
            load_bin(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (pickle.dumps((IMAGES, SAME[:2])), "6 images and 2 pairs"),
        (pickle.dumps(([], [])), "0 images and 0 pairs"),
        (pickle.dumps(IMAGES), "holds a list, not a pair"),
        (pickle.dumps({"bins": IMAGES}), "holds a dict, not a pair"),
        (pickle.dumps((IMAGES, {0: True})), "holds a dict, which is refused"),
        (pickle.dumps((["path.jpg"] * 6, SAME)), "holds a str as image 0"),
        (pickle.dumps((IMAGES, [0.3, 0.2, 0.1])), "holds a float where it should say"),
        (pickle.dumps((IMAGES, [2, 0, 1])), "holds a int where it should say"),
        (pickle.dumps((IMAGES, SAME))[:-700], "no whole pickle"),
        (IMAGES[0], "no whole pickle"),
        (b"", "no whole pickle"),
    ],
)
def test_a_file_that_is_no_set_is_one_clear_error(tmp_path, content, named):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        load_bin(tmp_path / "x.bin")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no\.bin: cannot be read"):
        load_bin(tmp_path / "no.bin")


def batches_of(content, batch_size: int, world_size: int) -> list[list]:
    return [
        list(
            iter_bin_batches(
                content,
                image_transform=TRANSFORM,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_images_are_decoded_once_over_the_ranks_and_bad_ones_left_out(tmp_path, world_size):
    images = [*IMAGES, *IMAGES]
    images[7] = b"no picture"
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images, SAME + SAME)))
    ranks = batches_of(load_bin(tmp_path / "x.bin"), 2, world_size)
    assert len({len(batches) for batches in ranks}) == 1, "as many batches on each rank"
    batches = [batch for rank in ranks for batch in rank]
    assert torch.cat([batch.ids for batch in batches]).tolist() == [*range(7), *range(8, 12)]
    assert max(len(batch.ids) for batch in batches) == 2
    (bad,) = [bad for batch in batches for bad in batch.bad]
    assert (bad.key, Path(bad.shard).name) == ("7", "x.bin")
    for batch in batches:
        for row, number in enumerate(batch.ids.tolist()):
            expected = TRANSFORM(decode_image(images[number]), None)
            assert torch.equal(batch.images[row], expected)
        assert (batch.labels == -1).all() and batch.texts.shape[0] == 0


def test_decoded_images_are_never_all_in_memory(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps((IMAGES * 300, SAME * 300)))
    content = load_bin(tmp_path / "x.bin")
    transform = ImageTransform(112, None, resize_mode="squash")
    tracemalloc.start()
    most = 0
    for batch in iter_bin_batches(
        content, image_transform=transform, batch_size=8, rank=0, world_size=1
    ):
        most = max(most, batch.images.untyped_storage().nbytes())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most == 8 * 3 * 112 * 112 and peak < 1_000_000, "1,800 images would be 68 MB"
