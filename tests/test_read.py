"""Stores and the reader against real files, a real HTTP server with faults, fsspec and pipes."""

import gc
import gzip
import multiprocessing
import os
import pickle
import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from range_server import Faults, serve

from data.cache import NodeCache
from data.errors import DataError
from data.read import Reader
from data.remote import FileStore, open_store
from data.retry import Retry

QUICK = Retry(first_wait_s=0.001, timeout_s=0.4)
DATA = random.Random(0).randbytes(600_000)
PIECE = 4 * 2**20


def quick_reader(**options) -> Reader:
    reader = Reader(timeout_s=0.4, **options)
    reader.retry = QUICK
    return reader


def spans_of(shard: str, num: int, seed: int = 1) -> list[tuple[str, int, int]]:
    draw = random.Random(seed)
    starts = [draw.randrange(len(DATA) - 9000) for _ in range(num)]
    return [(shard, start, draw.randrange(9000)) for start in starts]


def check_spans(reader: Reader, spans: list[tuple[str, int, int]]) -> None:
    for (_, start, size), got in zip(spans, reader.read_many(spans), strict=True):
        assert bytes(got) == DATA[start : start + size]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    return path


# -- files


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_file_is_read_by_offset_and_as_a_stream(tar, form):
    store = open_store(form.format(tar))
    assert store.seekable
    assert store.version() == (len(DATA), str(tar.stat().st_mtime_ns))
    assert store.read_at(10, 20) == DATA[10:30]
    assert store.read_at(len(DATA) - 5, 20) == DATA[-5:]
    assert store.read_at(len(DATA) + 5, 20) == b""
    with store.stream() as stream:
        assert stream.read() == DATA


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"b\.tar: No such file"):
        open_store(str(tmp_path / "b.tar")).version()


def test_spans_come_in_the_order_asked_for(tar, tmp_path):
    other = tmp_path / "b.tar"
    other.write_bytes(DATA)
    spans = spans_of(str(tar), 300) + spans_of(str(other), 300, seed=2)
    random.Random(3).shuffle(spans)
    check_spans(quick_reader(), spans)
    assert quick_reader().read_many([]) == []


def test_near_spans_are_one_read(tar, monkeypatch):
    reads = []
    real = FileStore.read_at
    monkeypatch.setattr(
        FileStore,
        "read_at",
        lambda self, at, size: reads.append((at, size)) or real(self, at, size),
    )
    check_spans(
        quick_reader(), [(str(tar), 1000, 500), (str(tar), 2048, 100), (str(tar), 90_000, 1)]
    )
    assert reads == [(1000, 1148), (90_000, 1)]


def test_open_files_stay_below_the_limit_of_the_process(tmp_path):
    paths = [tmp_path / f"{i}.tar" for i in range(150)]
    for path in paths:
        path.write_bytes(path.name.encode())
    gc.collect()  # readers of other tests, or they would be closed in between
    before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        reader = quick_reader()
        for _ in range(2):
            got = reader.read_many([(str(path), 0, len(path.name)) for path in paths])
            assert [bytes(name).decode() for name in got] == [path.name for path in paths]
        assert len(os.listdir("/proc/self/fd")) - before <= 50
        reader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == before


def _read_in_child(reader: Reader, spans, queue) -> None:
    queue.put([bytes(data) for data in reader.read_many(spans)])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_reader_in_use_goes_to_other_processes(tar, method):
    with serve({"a.tar": DATA}) as server:
        reader = quick_reader()
        spans = spans_of(str(tar), 5) + spans_of(server.url("a.tar"), 5)
        check_spans(reader, spans)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        children = [
            context.Process(target=_read_in_child, args=(reader, spans, queue)) for _ in range(2)
        ]
        for child in children:
            child.start()
        check_spans(reader, spans)
        for _ in children:
            assert queue.get(timeout=30) == [DATA[at : at + size] for _, at, size in spans]
        for child in children:
            child.join()


def test_a_pickled_reader_is_small_and_reads(tar):
    reader = quick_reader(versions={str(tar): open_store(str(tar)).version()})
    check_spans(reader, spans_of(str(tar), 3))
    state = pickle.dumps(reader)
    assert len(state) < 1000
    check_spans(pickle.loads(state), spans_of(str(tar), 3))


def test_a_shard_that_was_cut_or_replaced_is_an_error(tar):
    version = open_store(str(tar)).version()
    with pytest.raises(DataError, match=r"a\.tar: ends at byte 600000, but .* reaches to 600050"):
        quick_reader().read_many([(str(tar), 599_950, 100)])
    tar.write_bytes(DATA[:-1])
    with pytest.raises(DataError, match=r"a\.tar: changed since it was indexed"):
        quick_reader(versions={str(tar): version}).read_many([(str(tar), 0, 1)])


# -- http


@pytest.fixture
def server():
    with serve({"a.tar": DATA, "b.tar": DATA}) as running:
        yield running


def test_http_reads_ranges_over_one_connection(server):
    store = open_store(server.url("a.tar"), retry=QUICK)
    assert store.version() == (len(DATA), '"one"') and store.seekable
    assert store.read_at(1000, 5000) == DATA[1000:6000]
    assert store.read_at(len(DATA) - 7, 100) == DATA[-7:]
    assert store.read_at(len(DATA), 100) == b""
    assert store.stream().read() == DATA
    assert len(server.connections) == 1
    assert server.requests[1] == ("/a.tar", "bytes=1000-5999")


def test_the_shards_of_a_server_share_connections(server):
    reader = quick_reader()
    for _ in range(4):
        check_spans(reader, [*spans_of(server.url("a.tar"), 1), *spans_of(server.url("b.tar"), 1)])
    assert len(server.connections) <= 2


def test_503_is_tried_again_and_given_up_in_the_end(server, caplog):
    store = open_store(server.url("a.tar"), retry=QUICK)
    server.faults.num_503 = 3
    assert store.read_at(5, 10) == DATA[5:15]
    assert caplog.text.count("503 Service Unavailable; trying again") == 3
    server.faults.num_503 = 1000
    with pytest.raises(DataError, match=r"a\.tar: gave up after 6 tries: 503"):
        store.read_at(5, 10)


def test_a_cut_body_is_completed_by_its_missing_bytes_only(server):
    store = open_store(server.url("a.tar"), retry=QUICK)
    store.version()
    server.requests.clear()
    server.faults.cut_after = 200_000
    assert store.read_at(100, 500_000) == DATA[100:500_100]
    asked = [wanted.removeprefix("bytes=").split("-") for _, wanted in server.requests]
    assert [int(first) for first, _ in asked] == [100, 200_100, 400_100]
    assert store.stream().read() == DATA


def test_a_connection_that_is_always_cut_at_once_is_given_up(server):
    store = open_store(server.url("a.tar"), retry=QUICK)
    store.version()
    server.faults.cut_after = 0
    with pytest.raises(DataError, match="gave up after 6 tries: ConnectionError: the body was cut"):
        store.read_at(0, 100)


def test_a_stalled_answer_is_asked_for_again(server):
    store = open_store(server.url("a.tar"), retry=QUICK)
    store.version()
    server.faults.num_stalls, server.faults.stall_s = 1, 5.0
    start = time.monotonic()
    assert store.read_at(5, 10) == DATA[5:15]
    assert time.monotonic() - start < 3


def test_404_is_an_error_at_once(server):
    with pytest.raises(DataError, match=r"none\.tar: the server answers 404"):
        quick_reader().read_many([(server.url("none.tar"), 0, 10)])
    assert len(server.requests) == 1


def test_a_dead_server_is_named():
    with serve({}) as server:
        url = server.url("a.tar")
    with pytest.raises(DataError, match=r"a\.tar: gave up after 6 tries: ConnectionRefused"):
        open_store(url, retry=QUICK).version()


def test_a_shard_that_changes_on_the_server_is_an_error(server):
    store = open_store(server.url("a.tar"), retry=QUICK)
    store.version()
    server.faults.etags = ['"two"']
    with pytest.raises(DataError, match=r"a\.tar: changed while it was read"):
        store.read_at(5, 10)
    reader = quick_reader(versions={server.url("a.tar"): (len(DATA), '"one"')})
    with pytest.raises(DataError, match=r"a\.tar: changed since it was indexed"):
        reader.read_many([(server.url("a.tar"), 0, 10)])


def test_redirects_are_followed_and_remembered(server):
    server.faults.redirect = {"/old.tar": "/a.tar"}
    store = open_store(server.url("old.tar"), retry=QUICK)
    assert store.read_at(5, 10) == DATA[5:15]
    assert store.read_at(50, 10) == DATA[50:60]
    assert [path for path, _ in server.requests] == ["/old.tar", "/a.tar", "/a.tar"]
    server.faults.redirect = {"/old.tar": "/b.tar"}
    del server.files["/a.tar"]  # as a signed address that has expired
    assert store.read_at(5, 10) == DATA[5:15]
    server.faults.redirect["/b.tar"] = "/old.tar"
    with pytest.raises(DataError, match="more than 5 redirects"):
        open_store(server.url("old.tar"), retry=QUICK).version()


def test_a_server_without_ranges_is_streamed_once_and_read_by_offset(server, tmp_path, caplog):
    server.faults.ranges = False
    store = open_store(server.url("a.tar"), retry=QUICK)
    assert not store.seekable and store.version() == (len(DATA), '"one"')
    with pytest.raises(DataError, match="ignores byte ranges"):
        store.read_at(5, 10)
    server.faults.cut_after, server.faults.num_cuts = 250_000, 1
    assert store.stream().read() == DATA
    for _ in range(2):
        check_spans(quick_reader(cache_dir=tmp_path), spans_of(server.url("a.tar"), 20))
    assert caplog.text.count("cannot be read by offset; such shards are read once") == 2
    whole = [path for path, wanted in server.requests if not wanted]
    assert len(whole) == 3  # our stream with its cut, and one spool for both readers


# -- the node cache


def test_pieces_are_fetched_once_for_all_readers(server, tmp_path):
    spans = spans_of(server.url("a.tar"), 50)
    check_spans(quick_reader(cache_dir=tmp_path), spans)
    ranges = [wanted for _, wanted in server.requests if wanted != "bytes=0-0"]
    assert ranges == [f"bytes=0-{PIECE - 1}"]
    server.requests.clear()
    check_spans(quick_reader(cache_dir=tmp_path), spans)
    assert [wanted for _, wanted in server.requests] == ["bytes=0-0"]


def test_many_readers_that_start_together_fetch_a_piece_once(server, tmp_path):
    spans = spans_of(server.url("a.tar"), 10)
    readers = [quick_reader(cache_dir=tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(check_spans, readers, [spans] * 6))
    assert sum(wanted != "bytes=0-0" for _, wanted in server.requests) == 1


def test_the_same_name_in_two_places_and_two_versions_are_two_pieces(tmp_path):
    other = DATA[::-1]
    with serve({"x/a.tar": DATA, "y/a.tar": other}) as server:
        reader = quick_reader(cache_dir=tmp_path)
        assert reader.read_many([(server.url("x/a.tar"), 7, 9)]) == [DATA[7:16]]
        assert reader.read_many([(server.url("y/a.tar"), 7, 9)]) == [other[7:16]]
        server.files["/x/a.tar"], server.faults.etags = other, ['"two"']
        again = quick_reader(cache_dir=tmp_path)
        assert again.read_many([(server.url("x/a.tar"), 7, 9)]) == [other[7:16]]


@pytest.mark.parametrize("at", [2, 14, 700, 300_000, -1])
def test_a_damaged_piece_is_fetched_again(server, tmp_path, caplog, at):
    spans = [(server.url("a.tar"), 0, len(DATA))]
    check_spans(quick_reader(cache_dir=tmp_path), spans)
    (piece,) = (tmp_path / "pieces").iterdir()
    damaged = bytearray(piece.read_bytes())
    damaged[at] ^= 1
    piece.write_bytes(damaged)
    for _ in range(2):
        check_spans(quick_reader(cache_dir=tmp_path), spans)
    assert caplog.text.count("a cached piece was damaged") == 1
    piece.write_bytes(damaged[:400])
    check_spans(quick_reader(cache_dir=tmp_path), spans)


def test_the_cache_stays_below_its_limit_and_drops_what_was_not_used(tmp_path):
    cache = NodeCache(tmp_path, 100_000)

    def used_bytes() -> int:
        return sum(path.stat().st_size for path in (tmp_path / "pieces").iterdir())

    fetched = []

    def read(number: int) -> bytes:
        return cache.read(
            f"piece {number}", 0, 10_000, lambda: fetched.append(number) or bytes([number]) * 10_000
        )

    for number in range(30):
        assert read(number) == bytes([number]) * 10_000
        assert used_bytes() <= 100_000
        for path in (tmp_path / "pieces").iterdir():  # an hour passes
            os.utime(path, (path.stat().st_mtime - 3600,) * 2)
        read(0)
    assert fetched == list(range(30))


def test_a_cache_that_cannot_be_written_costs_only_speed(server, tmp_path, monkeypatch, caplog):
    reader = quick_reader(cache_dir=tmp_path)

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    check_spans(reader, spans_of(server.url("a.tar"), 3))
    assert "not cached: [Errno 28]" in caplog.text
    assert not any((tmp_path / "pieces").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir .*file: Not a directory"):
        quick_reader(cache_dir=tmp_path / "file").read_many(spans_of(server.url("a.tar"), 1))


# -- gzip, pipes, fsspec


@pytest.fixture
def spool_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"nsphere-{os.getuid()}"


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz"])
def test_a_gzipped_shard_is_kept_as_a_plain_tar(tmp_path, spool_folder, ending):
    shard = tmp_path / f"a{ending}"
    shard.write_bytes(gzip.compress(DATA, 1))
    store = open_store(str(shard))
    assert not store.seekable and store.stream().read() == DATA
    with pytest.raises(DataError, match="gzip cannot be read by offset"):
        store.read_at(0, 1)
    check_spans(quick_reader(versions={str(shard): store.version()}), spans_of(str(shard), 20))
    (spool,) = (spool_folder / "spools").iterdir()
    assert spool.read_bytes() == DATA
    inode = spool.stat().st_ino
    check_spans(quick_reader(), spans_of(str(shard), 20))
    assert spool.stat().st_ino == inode


def test_a_cut_gzip_gives_what_comes_before_the_cut(tmp_path, spool_folder, caplog):
    shard = tmp_path / "a.tar.gz"
    packed = gzip.compress(DATA, 1)
    shard.write_bytes(packed[: len(packed) // 2])
    assert (
        bytes(*quick_reader().read_many([(str(shard), 100_000, 50_000)])) == DATA[100_000:150_000]
    )
    assert "the compressed stream is broken" in caplog.text
    with pytest.raises(DataError, match="ends at byte"):
        quick_reader().read_many([(str(shard), 0, len(DATA))])


def test_a_gzip_behind_http_is_streamed_by_ranges(tmp_path):
    with serve({"a.tar.gz": gzip.compress(DATA, 1)}, Faults(cut_after=200_000)) as server:
        check_spans(quick_reader(cache_dir=tmp_path), spans_of(server.url("a.tar.gz"), 5))


@pytest.mark.parametrize("command", ["cat {}", "gzip -c {}"])
def test_a_pipe_is_streamed_through_its_command(tar, command):
    url = "pipe:" + command.format(tar)
    store = open_store(url)
    assert not store.seekable and store.version() == (-1, "")
    with store.stream() as stream:
        assert stream.read() == DATA
    check_spans(quick_reader(), spans_of(url, 5))


def test_a_pipe_without_a_version_is_never_taken_from_an_older_run(tar, tmp_path):
    url = f"pipe:cat {tar}"
    assert quick_reader(cache_dir=tmp_path).read_many([(url, 0, 5)]) == [DATA[:5]]
    tar.write_bytes(DATA[::-1])
    assert quick_reader(cache_dir=tmp_path).read_many([(url, 0, 5)]) == [DATA[::-1][:5]]


def test_a_pipe_whose_content_the_index_knows_runs_once(tar, tmp_path):
    runs = tmp_path / "runs"
    url = f"pipe:echo run >> {runs}; cat {tar}"
    for _ in range(3):
        reader = quick_reader(cache_dir=tmp_path / "cache", versions={url: (-1, "digest")})
        check_spans(reader, spans_of(url, 5))
    assert runs.read_text() == "run\n"


def test_a_command_that_fails_is_named(tar):
    with pytest.raises(DataError, match="exit 3: the command failed with exit status 3"):
        quick_reader().read_many([(f"pipe:cat {tar}; exit 3", 0, 10)])


def test_a_stream_that_is_left_early_ends_its_command(tar):
    with open_store(f"pipe:cat {tar} {tar} {tar}").stream() as stream:
        assert stream.read(10) == DATA[:10]


def test_fsspec_stores_are_read_by_range(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tar", DATA)
    store = open_store("memory://bucket/a.tar", retry=QUICK)
    assert store.seekable and store.version()[0] == len(DATA) and store.version()[1]
    assert store.read_at(7, 50) == DATA[7:57]
    assert store.read_at(len(DATA) - 7, 50) == DATA[-7:]
    assert store.stream().read() == DATA
    for cache_dir in (None, tmp_path):
        reader = pickle.loads(pickle.dumps(quick_reader(cache_dir=cache_dir)))
        check_spans(reader, spans_of("memory://bucket/a.tar", 20))
    with pytest.raises(DataError, match=r"memory://bucket/b\.tar: FileNotFoundError"):
        open_store("memory://bucket/b.tar", retry=QUICK).version()


def test_a_flaky_store_is_tried_again(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tar", DATA)
    store = open_store("memory://bucket/a.tar", retry=QUICK)
    real, calls = type(memory).cat_file, []

    def flaky(self, path, start=None, end=None):
        calls.append((start, end))
        if len(calls) < 3:
            raise ConnectionResetError("the store is tired")
        return real(self, path, start, min(end, start + 20))  # and gives less than asked for

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert store.read_at(10, 50) == DATA[10:60]
    assert calls == [(10, 60)] * 3 + [(30, 60), (50, 60)]


def test_an_unknown_store_says_what_is_missing():
    with pytest.raises(DataError, match=r"nowhere://x/a\.tar: ValueError: Protocol not known"):
        open_store("nowhere://x/a.tar").version()


def test_waiting_for_stores_is_side_by_side():
    faults = Faults(num_stalls=1000, stall_s=0.1)
    with serve({f"{name}.tar": DATA for name in range(8)}, faults) as server:
        spans = [(server.url(f"{name}.tar"), 500, 50) for name in range(8)]
        reader = quick_reader()
        start = time.monotonic()
        check_spans(reader, spans)
        assert len(server.requests) == 16  # a version and a range each
        assert time.monotonic() - start < 1.0  # sixteen times 0.1 s
