"""Tensor files: what is written is the safetensors format, and never twice in memory."""

import hashlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.durable import RowStream, TensorFile, write_file

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(-100, 100, shape, generator=generator)
    return drawn % 2 == 0 if dtype == torch.bool else drawn.to(dtype)


TENSORS = {
    **{str(dtype): some((5, 3), dtype) for dtype in DTYPES},
    "number": torch.tensor(7),
    "small": torch.tensor(0.5, dtype=torch.bfloat16),
    "no rows": torch.empty(0, 4, dtype=torch.bfloat16),
    "no columns": torch.empty(4, 0),
    "turned": some((4, 6), torch.float32).T,
    "part": some((9, 4), torch.int32)[2:7, 1:3],
    "deep": some((2, 3, 4), torch.float32),
}


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    size, digest = write_file(path, TENSORS)
    assert size == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = safetensors.torch.load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_tensor_files_of_either_writer_are_read(tmp_path):
    write_file(tmp_path / "ours.safetensors", TENSORS)
    theirs = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors", {"format": "pt"})
    for name in ("ours", "theirs"):
        file = TensorFile.open(tmp_path / f"{name}.safetensors")
        found = file.whole()
        assert found.keys() == TENSORS.keys()
        for key, tensor in TENSORS.items():
            assert torch.equal(found[key], tensor), key
            assert file.dtype(key) == tensor.dtype


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 20),
    width=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_rows_of_a_tensor_come_alone(tmp_path_factory, rows, width, dtype, data):
    path = tmp_path_factory.mktemp("rows") / "x.safetensors"
    table = some((rows, width), dtype)
    write_file(path, {"before": some((3,), torch.int8), "table": table, "after": torch.ones(2)})
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(TensorFile.open(path).rows("table", start, stop), table[start:stop])


def test_rows_that_come_in_blocks_are_the_same_file(tmp_path):
    table = some((50, 3), torch.float32)
    blocks = iter(table.split([0, 7, 1, 30, 12]))
    stream = RowStream((50, 3), torch.bfloat16, blocks)
    whole = write_file(tmp_path / "whole.safetensors", {"a": table.bfloat16(), "b": table})
    assert write_file(tmp_path / "x.safetensors", {"a": stream, "b": table}) == whole
    short = RowStream((50, 3), torch.float32, iter([table[:49]]))
    with pytest.raises(RuntimeError, match="a: 12 bytes of 600 were not given"):
        write_file(tmp_path / "y.safetensors", {"a": short})


def test_a_file_that_ends_early_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, {"a": torch.ones(100, 4), "b": torch.ones(100, 4)})
    path.write_bytes(path.read_bytes()[:-8])
    file = TensorFile.open(path)
    assert torch.equal(file.rows("b", 0, 99), torch.ones(99, 4))
    with pytest.raises(OSError, match=r"x.safetensors: ends inside b: 8 bytes of 16"):
        file.rows("b", 99, 100)


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from trainer.durable import RowStream, TensorFile, write_file

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path, mib = Path(sys.argv[1]), 2**20
table = torch.ones(512 * mib // 256, 128, dtype=torch.bfloat16)
start = peak()
write_file(path, {"rows": table, "narrow": torch.zeros(7)})
wrote = peak() - start
file = TensorFile.open(path)
for first in range(0, len(table), 2**18):
    table[first : first + 2**18] = file.rows("rows", first, first + 2**18)
print(wrote // mib, (peak() - start) // mib)
"""


def test_memory_does_not_double(tmp_path):
    """A table of 512 MiB is written in pieces of 64 MiB, and read in blocks as small as wished."""
    told = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    wrote, read = map(int, told.stdout.split())
    assert wrote < 80
    assert read < 160
