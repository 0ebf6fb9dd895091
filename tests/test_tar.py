"""The header parser against tarfile and GNU tar, whole and damaged."""

import gzip
import io
import random
import shutil
import subprocess
import tarfile

import pytest

from data.tar import (
    BLOCK,
    DAMAGE,
    Fault,
    ForwardReads,
    HeaderError,
    Member,
    Window,
    iter_members,
    parse_header,
    parse_pax,
    split_name,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = {
    "short": "a.jpg",
    "folder": "dir/sub.v1/a.jpg",
    "prefix": "d" * 90 + "/" + "e" * 60 + ".jpg",
    "hundred": "f" * 96 + ".jpg",
    "unicode": "d\u00e9j\u00e0/\u56fe.jpg",
    "long": "g" * 300 + ".jpg",
    "longer": ("h" * 90 + "/") * 40 + "x.jpg",
}


def make_tar(members, format_name="ustar", mtime=0):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format_name]) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), mtime
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def walk(data, window_bytes=4096):
    reads = []

    def read_at(offset, size):
        reads.append(offset)
        return data[offset : offset + size]

    found = list(iter_members(Window(read_at, lambda: len(data), window_bytes)))
    members = [item for item in found if isinstance(item, Member)]
    faults = [item for item in found if isinstance(item, Fault)]
    return members, faults, reads


def tarfile_members(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [Member(i.name, i.offset_data, i.size) for i in tar if i.isreg()]


def six_members():
    rng = random.Random(0)
    return [
        (f"k{i}.bin", rng.randbytes(size)) for i, size in enumerate((0, 1, 511, 512, 513, 5000))
    ]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("kind", NAMES)
def test_members_equal_tarfiles(format_name, kind):
    if format_name == "ustar" and kind in ("long", "longer"):
        pytest.skip("ustar has no room for such a name")
    members = [("first.txt", b"x"), (NAMES[kind], b"y" * 700), ("last.txt", b"")]
    data = make_tar(members, format_name, mtime=1.5 if format_name == "pax" else 0)
    found, faults, _ = walk(data)
    assert found == tarfile_members(data)
    assert [member.name for member in found] == [name for name, _ in members]
    assert faults == []


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_members_of_gnu_tar(tmp_path, form):
    long = "n" * 20 + "/" + "m" * (60 if form == "v7" else 120) + ".txt"
    for name in ("a.jpg", "dir/b.jpg", *([long] if form != "ustar" else [])):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() * 50)
    (tmp_path / "in" / "soft.jpg").symlink_to("a.jpg")
    (tmp_path / "in" / "hard.jpg").hardlink_to(tmp_path / "in" / "a.jpg")
    archive = tmp_path / "x.tar"
    command = ["tar", f"--format={form}", "--sort=name", "-cf", archive, "-C", tmp_path / "in", "."]
    subprocess.run(command, check=True)
    data = archive.read_bytes()
    members, faults, _ = walk(data)
    assert members == tarfile_members(data)
    assert len(members) == (2 if form == "ustar" else 3)
    details = [fault.detail for fault in faults]
    assert [fault.kind for fault in faults] == ["unsupported"] * 2, details
    assert "hard.jpg is a hard link" in details[0] and "soft.jpg is a symbolic" in details[1]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command")
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_named_and_stepped_over(tmp_path, form):
    with open(tmp_path / "a.jpg", "wb") as file:
        for hole in range(1, 60):  # more pieces than the header's own map holds
            file.seek(hole * 100_000)
            file.write(b"x" * 4096)
    (tmp_path / "b.jpg").write_bytes(b"whole")
    archive = tmp_path / "x.tar"
    command = ["tar", f"--format={form}", "-S", "-cf", archive, "-C", tmp_path, "a.jpg", "b.jpg"]
    subprocess.run(command, check=True)
    members, faults, _ = walk(archive.read_bytes())
    assert [member.name for member in members] == ["b.jpg"]
    assert [fault.kind for fault in faults] == ["unsupported"]


@pytest.mark.parametrize("format_name", ["gnu", "pax"])
def test_members_beyond_8_gib(format_name):
    size = 9 << 30
    info = tarfile.TarInfo("huge.bin")
    info.size = size
    start = info.tobuf(FORMATS[format_name])
    pieces = {0: start, len(start) + size: make_tar([("b.txt", b"after")])}

    def read_at(offset, count):
        for at, piece in pieces.items():
            if at <= offset < at + len(piece):
                return piece[offset - at : offset - at + count]
        return b""

    found = list(iter_members(Window(read_at, lambda: max(pieces) + len(pieces[max(pieces)]))))
    huge, after = found
    assert huge == Member("huge.bin", len(start), size)
    assert after == Member("b.txt", len(start) + size + BLOCK, 5)


def test_global_pax_headers_and_concatenated_archives():
    buffer = io.BytesIO()
    options = {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "made here"}}
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    members, faults, _ = walk(buffer.getvalue() + make_tar([("b.txt", b"b")]))
    assert [member.name for member in members] == ["a.txt", "b.txt"]
    assert [fault.kind for fault in faults] == ["data_after_end"]


def test_old_signed_checksums_are_accepted():
    block = bytearray(make_tar([("caf\u00e9.txt", b"")])[:BLOCK])
    spaced = block[:148] + b" " * 8 + block[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in spaced)
    block[148:156] = b"%06o\0 " % signed
    assert parse_header(bytes(block)).name == "caf\u00e9.txt"


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_flipped_header_byte_costs_that_member_and_no_other(format_name):
    data = make_tar(six_members(), format_name)
    whole = tarfile_members(data)
    for number, member in enumerate(whole):
        for at in (0, 99, 124, 135, 148, 156, 257, 300, 345, 511):
            damaged = bytearray(data)
            damaged[member.offset - BLOCK + at] ^= 0x11
            members, faults, _ = walk(bytes(damaged))
            assert members == whole[:number] + whole[number + 1 :]
            assert [fault.kind for fault in faults] == ["bad_header"]
            assert faults[0].offset == member.offset - BLOCK


def test_after_damage_a_name_that_may_be_cut_is_not_believed():
    members = [("a.txt", b"a"), ("n" * 200 + ".txt", b"b"), ("c.txt", b"c")]
    for format_name in ("gnu", "pax"):
        data = bytearray(make_tar(members, format_name))
        data[2 * BLOCK] ^= 1  # the header that says the long name
        found, faults, _ = walk(bytes(data))
        assert [member.name for member in found] == ["a.txt", "c.txt"]
        assert {fault.kind for fault in faults} == {"bad_header"}


def test_cut_at_every_block():
    data = make_tar(six_members())
    whole = tarfile_members(data)
    end = whole[-1].offset + -(-whole[-1].size // BLOCK) * BLOCK
    for cut in range(0, end + BLOCK + 1, BLOCK):
        members, faults, _ = walk(data[:cut])
        kept = [m for m in whole if m.offset <= cut]
        assert members == kept
        assert [f.kind for f in faults] == (["truncated"] if cut else ["empty"])
        inside = [m.name for m in kept if m.offset + m.size > cut]
        assert [faults[0].name] == (inside or [""])


@pytest.mark.parametrize("data", [b"", bytes(BLOCK), b"\x1f\x8b" + bytes(600), b"<html>" * 300])
def test_what_is_no_tar_is_one_fault(data):
    members, faults, _ = walk(data)
    assert members == [] and len(faults) == 1
    assert faults[0].kind in DAMAGE | {"empty"}


def test_an_empty_archive_is_whole():
    assert walk(make_tar([])) == ([], [], walk(make_tar([]))[2])


def test_small_members_share_reads():
    members = [(f"{i:04d}.{ending}", b"x" * 100) for i in range(500) for ending in ("txt", "cls")]
    _, _, reads = walk(make_tar(members))
    assert len(reads) < 300  # a thousand members, 4096 bytes a read


def test_a_stream_gives_the_same_and_names_its_failure():
    data = make_tar(six_members())
    whole = tarfile_members(data)
    packed = gzip.compress(data)
    for blob, kind in ((packed, None), (packed[: len(packed) // 2], "truncated")):
        reads = ForwardReads(gzip.GzipFile(fileobj=io.BytesIO(blob)))
        found = list(iter_members(Window(reads.read_at, reads.end)))
        members = [item for item in found if isinstance(item, Member)]
        assert members == whole[: len(members)]
        assert [f.kind for f in found if isinstance(f, Fault)] == ([kind] if kind else [])
        assert bool(reads.failure) == bool(kind)
        assert not reads.garbled
    broken = packed[:-8] + bytes(8)
    reads = ForwardReads(gzip.GzipFile(fileobj=io.BytesIO(broken)))
    list(iter_members(Window(reads.read_at, reads.end)))
    assert reads.garbled and "CRC" in reads.failure


def test_pax_records():
    assert parse_pax(b"11 path=ab\n12 size=123\n") == {"path": "ab", "size": "123"}
    for damaged in (b"11 path=ab", b"12 path=ab\n", b"xx path=ab\n", b"9 pathab\n"):
        with pytest.raises(HeaderError, match="does not parse"):
            parse_pax(damaged)


def test_names_split_like_webdatasets():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "d/a.b.jpg", "d.1/a.jpg", "./a.JPG", "x/y/z.tar.gz", "/abs/a.txt"):
        key, ending = base_plus_ext(name)
        assert split_name(name) == (key, ending.lower())
    for name in ("a", ".hidden", "d/.hidden.jpg", "a.", "d.1/a", "__x__/a.jpg"):
        assert split_name(name) is None
    assert split_name("../../etc/a.txt") == ("../../etc/a", "txt")
