"""What disks do to a run, for real: full, read-only, forbidden, slow, killed, damaged, shared."""

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from disks import build_slow_fsync, fill, hide, mount, mounted, needs_root, small_disk
from ranks import run_ranks
from test_cli import TOML, command, environment
from tiny_faces import face_config
from tiny_runs import MODEL, read_losses, read_samples, tiny_config, train_rank, write_shards

from trainer import lock as locking
from trainer import run as running
from trainer.checkpoint import (
    CheckpointError,
    TrainState,
    check,
    find_newest,
    list_steps,
    load_state,
)
from trainer.config import ConfigError
from trainer.durable import LineFile
from trainer.events import read_events
from trainer.lock import RunLock, locks_reach, read_owner
from trainer.ranks import Ranks
from trainer.run import open_run, open_run_together
from trainer.saving import CheckpointFolder

FORKSERVER = multiprocessing.get_context("forkserver")


def refusals(run: Path) -> list[tuple[int, str]]:
    events = read_events(run)
    return [(e["step"], e["error"]) for e in events if e["event"] == "save_refused"]


def save(saver: CheckpointFolder, step: int, numel: int = 1000) -> None:
    rank = saver._together.ranks.rank
    state = TrainState(fingerprint="f", world_size=1, zero_stage=0, step=step)
    saver.save(state, "", {f"deepspeed/x{rank}.pt": {"w": torch.full((numel,), float(step))}})


# --- full ----------------------------------------------------------------------------------------


def full_for_a_while(group, config, run: str, disk: str, full_from: int, full_to: int) -> bool:
    """Train with a disk that is full after step `full_from` until after step `full_to`."""
    from trainer.train import train

    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if group.rank() == 0 and steps == full_from:
            fill(Path(disk))
        if group.rank() == 0 and steps == full_to:
            (Path(disk) / "ballast").unlink()
        return False

    ranks = Ranks(group, group.rank(), group.size(), group.rank())
    return train(config, Path(run), ranks, stop=stop)


@needs_root
@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_one_save_and_no_step(tmp_path, background):
    """Metrics wait for room, log and samples say what they lack, the next save is whole."""
    config = tiny_config(tmp_path, checkpoint={"background": background, "keep_last": 2})
    with small_disk(tmp_path / "disk", 160) as disk:
        run = disk / "run"
        told = run_ranks(2, full_for_a_while, config, str(run), str(disk), 6, 10)
        assert told == [True, True]
        assert list_steps(run / "checkpoints") == [4, 12]
        assert find_newest(run / "checkpoints") == run / "checkpoints" / "step-00000012"
        assert not list((run / "checkpoints").glob(".*"))
        assert sorted(read_losses(run)) == list(range(1, 13))
        log = (run / "log" / "rank-0000.log").read_text()
        events = read_events(run)
        shown = {*range(1, 13)} - read_samples(run).keys()
    told = [event for event in events if event["event"] == "save_refused"]
    assert [event["step"] for event in told] == [8] and "No space left" in told[0]["error"]
    assert "metrics.jsonl: the lines that were kept are written" in log
    assert shown and shown <= set(range(6, 11))


@needs_root
def test_a_disk_that_stays_full_ends_the_run_with_what_is_saved(tmp_path):
    config = tiny_config(tmp_path)
    with small_disk(tmp_path / "disk", 160) as disk:
        run = disk / "run"
        with pytest.raises(AssertionError) as told:
            run_ranks(1, full_for_a_while, config, str(run), str(disk), 6, 0)
        assert find_newest(run / "checkpoints") == run / "checkpoints" / "step-00000004"
        (disk / "ballast").unlink()
        assert run_ranks(1, train_rank, config, str(run)) == [True]
        assert sorted(read_losses(run)) == list(range(1, 13))
    text = str(told.value)
    assert "CheckpointError" in text and "step-00000012: not saved: rank 0: No space left" in text
    assert "make room on that disk, or lower checkpoint.keep_last" in text
    assert "the newest checkpoint there: step-00000004" in text


def limit_size(bytes_: int) -> None:
    """The kernel refuses longer files, as it does for a full disk or a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def refuse_sometimes(group, folder: str, full_rank: int, background: bool) -> list[str]:
    """Steps 1, 4, 5 find room, 2, 3 and from 6 on none; what this rank was told."""
    ranks = Ranks(group, group.rank(), group.size())
    saver = CheckpointFolder(
        Path(folder) / "checkpoints", ranks, keep_last=2, background=background, max_refused=2
    )
    told = []
    for step in range(1, 9):
        if ranks.rank == full_rank and step in (2, 4, 6):
            limit_size(resource.RLIM_INFINITY if step == 4 else 50_000)
        try:
            save(saver, step, numel=100_000)
            while saver.poll():
                time.sleep(0.01)
            told.append("")
        except CheckpointError as error:
            told.append(str(error))
    try:
        saver.wait()
    except CheckpointError as error:
        told.append(str(error))
    return told


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("full_rank", [0, 1])
def test_so_many_refused_saves_in_a_row_end_a_run(tmp_path, full_rank, background):
    told = run_ranks(2, refuse_sometimes, str(tmp_path), full_rank, background)
    assert told[0] == told[1]
    assert told[0][:7] == [""] * 7, "two in a row are a warning"
    for text in told[0][7:]:
        assert f"step-00000008: not saved: rank {full_rank}: File too large" in text
        assert "ulimit -f" in text and "the newest checkpoint there: step-00000005" in text
    assert len(told[0]) == 9
    assert list_steps(tmp_path / "checkpoints") == [4, 5]
    assert [step for step, _ in refusals(tmp_path)] == [2, 3, 6, 7, 8]


def test_lines_wait_for_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    file = LineFile(path)
    file.write("before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        for number in range(3):
            file.write(f"line {number}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert caplog.text.count("its lines are kept in memory until they can be written") == 1
    file.write("after")
    file.close()
    assert path.read_text().split("\n") == ["before", "line 0", "line 1", "line 2", "after", ""]


# --- read-only, forbidden ------------------------------------------------------------------------


@needs_root
def test_a_disk_that_turns_read_only_and_back(tmp_path, caplog):
    with small_disk(tmp_path / "disk", 16) as disk:
        saver = CheckpointFolder(disk / "run", Ranks(), keep_last=2, max_refused=1)
        save(saver, 1)
        mount("-o", "remount,ro", str(disk))
        save(saver, 2)
        assert "step-00000002: not saved: Read-only file system" in caplog.text
        assert "that file system is mounted read-only" in caplog.text
        mount("-o", "remount,rw", str(disk))
        save(saver, 3)
        saver.wait()
        assert list_steps(disk / "run") == [1, 3] and not check(disk / "run" / "step-00000003")


@needs_root
def test_a_run_in_a_read_only_folder_is_one_clear_line(tmp_path):
    shards = write_shards(tmp_path / "x")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.toml").write_text(TOML.format(shards=shards))
    (tmp_path / "kept").mkdir()
    with mounted(tmp_path / "disk", "--bind", str(tmp_path / "kept")) as disk:
        mount("-o", "remount,bind,ro", str(disk))
        start = [*command("train", "run.toml", "--run", str(disk / "r")), "--nproc", "2"]
        told = subprocess.run(
            start, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
        )
    assert told.returncode == 2, told.stderr
    lines = [line for line in told.stderr.splitlines() if line.startswith("nsphere: ")]
    assert len(lines) == 1 and f"{disk / 'r'}: this run cannot write there" in lines[0]
    assert "Read-only file system" in lines[0] and "name another folder with --run" in lines[0]


def as_nobody(folder: str, told_to: Connection) -> None:
    """Tell what a user without rights is told: at the start of a run, at a save."""
    os.setgid(65534)
    os.setuid(65534)
    told = []
    try:
        open_run(Path(folder) / "run", tiny_config(Path(folder)))
    except ConfigError as error:
        told.append(str(error))
    try:
        save(CheckpointFolder(Path(folder) / "run" / "checkpoints", Ranks(), keep_last=1), 2)
    except CheckpointError as error:
        told.append(str(error))
    told_to.send(told)


@needs_root
def test_a_folder_of_another_user_is_one_clear_line():
    """Under /tmp itself: pytest's own folders let nobody pass."""
    folder = Path("/tmp") / f"nsphere-{os.getpid()}"
    try:
        save(CheckpointFolder(folder / "run" / "checkpoints", Ranks(), keep_last=1), 1)
        tiny_config(folder)
        here, there = FORKSERVER.Pipe()
        FORKSERVER.Process(target=as_nobody, args=(str(folder), there)).start()
        start, saved = here.recv()
        assert not check(folder / "run" / "checkpoints" / "step-00000001")
    finally:
        shutil.rmtree(folder)
    assert f"{folder / 'run'}: this run cannot write there" in start
    assert "Permission denied, as user 65534" in start and "\n" not in start
    assert "not saved: Permission denied" in saved and "this user may not write there" in saved
    assert "the newest checkpoint there: step-00000001" in saved


# --- slow ----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("gcc") is None, reason="builds a slow fsync: needs gcc")
def test_a_slow_disk_of_one_rank_is_no_dead_rank(tmp_path):
    """Each flush of rank 1 takes thrice as long as a silent rank is waited for."""
    shards = write_shards(tmp_path / "x")
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "run.toml").write_text(TOML.format(shards=shards))
    slow = {"LD_PRELOAD": str(build_slow_fsync(tmp_path)), "SLOW_RANK": "1", "SLOW_S": "9"}
    options = ["--train.duration=4 steps", "--checkpoint.every=2 steps", "--zero.stage=1"]
    options += ["--launch.timeout=3", "--launch.max_restarts=0"]
    started = time.monotonic()
    told = subprocess.run(
        command("train", "run.toml", "--run", "r", "--nproc", "2", *options),
        cwd=tmp_path,
        env={**environment(), **slow},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert told.returncode == 0, told.stderr
    assert time.monotonic() - started > 18
    assert list_steps(tmp_path / "r" / "checkpoints") == [2, 4]
    assert not [e for e in read_events(tmp_path / "r") if e["event"] in ("lost", "restart")]


# --- killed --------------------------------------------------------------------------------------


def save_for_ever(folder: str, die_before: int) -> None:
    """Save again and again, every second step twice; die before the n-th change of a folder."""
    changes = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal changes
        named = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open")
        if not named or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not (isinstance(arguments[1], str) and "w" in arguments[1]):
            return
        changes += 1
        if changes == die_before:
            os.kill(os.getpid(), signal.SIGKILL)

    if die_before:
        sys.addaudithook(watch)
    saver = CheckpointFolder(Path(folder), Ranks(), keep_last=1, background=die_before % 2 == 1)
    saver.newest()
    steps = list_steps(Path(folder))
    (Path(folder).parent / "alive").touch()
    for number in range(2 * (steps[-1] if steps else 1), 10**6):
        save(saver, number // 2, numel=20_000)
        saver.wait()
        (Path(folder).parent / "done").write_text(str(number // 2))


def kill_and_look(folder: Path, die_before: int, after_s: float) -> int:
    """One life of it; the step of the whole checkpoint that is there afterwards."""
    life = FORKSERVER.Process(target=save_for_ever, args=(str(folder), die_before))
    (folder.parent / "alive").unlink(missing_ok=True)
    life.start()
    if not die_before:
        while not (folder.parent / "alive").exists():
            time.sleep(0.002)
        time.sleep(after_s)
        life.kill()
    life.join(60)
    assert life.exitcode == -signal.SIGKILL
    done = folder.parent / "done"
    saved = int(done.read_text()) if done.exists() and done.read_text() else 0
    newest = CheckpointFolder(folder, Ranks(), keep_last=1).newest()
    if newest is None:
        assert saved == 0, "a checkpoint that was whole is gone"
        return 0
    step = load_state(newest).step
    weights = torch.load(newest / "deepspeed" / "x0.pt", weights_only=True)
    assert step >= saved and weights["w"].eq(step).all() and len(weights["w"]) == 20_000
    assert not list(folder.glob(".*")), "nothing half done is left"
    return step


def test_killed_before_any_change_of_a_folder_a_whole_checkpoint_remains(tmp_path):
    """Every open, mkdir, rename, rmdir and remove of the first, a repeated and a pruning save."""
    for die_before in range(1, 36, 1):
        folder = tmp_path / str(die_before) / "checkpoints"
        folder.mkdir(parents=True)
        kill_and_look(folder, die_before, 0.0)


def test_killed_at_any_moment_a_whole_checkpoint_remains(tmp_path):
    """One folder, many lives: each goes on from what the last one left."""
    moments = random.Random(5)
    folder = tmp_path / "checkpoints"
    steps = [0]
    while len(steps) < 30 or steps[-1] <= 10:  # on a busy machine a life may save nothing
        steps.append(kill_and_look(folder, 0, moments.uniform(0.0, 0.3)))
    assert steps == sorted(steps)


# --- damaged -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def face_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a run that has files of every kind: of centers, averages, embeddings."""
    folder = tmp_path_factory.mktemp("faces")
    config = face_config(
        folder,
        data={"batching": "planned"},
        negatives={"refresh": "2 steps", "lead": "1 steps", "cluster_size": 4},
        train={"duration": "6 steps", "ema": 0.9},
        checkpoint={"every": "6 steps"},
        eval={"batch_size": 8},
    )
    run_ranks(2, train_rank, config, str(folder / "run"))
    return folder / "run" / "checkpoints" / "step-00000006"


def test_any_file_truncated_or_flipped_is_named(face_checkpoint, tmp_path):
    files = [p for p in sorted(face_checkpoint.rglob("*")) if p.is_file()]
    names = {str(path.relative_to(face_checkpoint)) for path in files}
    kinds = {"state.json", "config.toml", "ema.safetensors", "centers/layout.json"}
    kinds |= {"centers/part-00001.safetensors", "negatives/part-00000.safetensors"}
    assert kinds <= names and any("optim" in name for name in names)
    copy = tmp_path / "copy"
    shutil.copytree(face_checkpoint, copy)
    for name in names - {"manifest.json"}:
        path, content = copy / name, (copy / name).read_bytes()
        path.write_bytes(content[:-1])
        assert (
            check(copy) == f"{path.name} has {len(content) - 1} bytes, {len(content)} were written"
        )
        flipped = bytearray(content)
        flipped[len(content) // 3] ^= 4
        path.write_bytes(flipped)
        assert "does not match its checksum: bytes have changed since the save" in check(copy)
        path.write_bytes(content)
    assert check(copy) == ""


def test_a_damaged_newer_checkpoint_never_outlives_a_whole_one(tmp_path):
    """The run went back to step 4 because 8 was damaged: what it saves then is kept."""
    saver = CheckpointFolder(tmp_path, Ranks(), keep_last=1)
    for step in (4, 8):
        save(saver, step)
    (tmp_path / "step-00000008" / "deepspeed" / "x0.pt").write_bytes(b"")
    save(saver, 6)
    assert find_newest(tmp_path) == tmp_path / "step-00000006"
    save(saver, 8)
    assert list_steps(tmp_path) == [8] and not check(tmp_path / "step-00000008")


def test_links_and_files_among_the_checkpoints_are_no_obstacle(tmp_path, caplog):
    saver = CheckpointFolder(tmp_path, Ranks(), keep_last=1)
    save(saver, 1)
    (tmp_path / "latest").symlink_to("step-99999999")
    (tmp_path / "step-00000007").write_text("a file")
    (tmp_path / "step-00000008").symlink_to("nowhere")
    (tmp_path / "step-none").mkdir()
    with caplog.at_level(logging.WARNING, logger="nsphere.checkpoint"):
        assert saver.newest() == tmp_path / "step-00000001"
    assert "step-00000007: no folder" in caplog.text
    assert "step-00000008: a link to nowhere" in caplog.text
    save(saver, 8)
    save(saver, 9)
    assert list_steps(tmp_path) == [9] and (tmp_path / "latest").is_symlink()
    assert find_newest(tmp_path) == tmp_path / "step-00000009"


# --- two runs, several hosts ---------------------------------------------------------------------


def hold(folder: str, host: str, job: str, reaches: bool, fork: bool) -> None:
    """Hold a run's lock, as a job of another host would, until killed."""
    import ctypes

    if host:
        ctypes.CDLL(None).unshare(0x04000000)  # a host name of its own
        ctypes.CDLL(None).sethostname(host.encode(), len(host))
    if job:
        os.environ["SLURM_JOB_ID"] = job
    held = RunLock(Path(folder) / ".lock", reaches=reaches)
    if fork and os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    (Path(folder) / "held").write_text(str(held.token))
    time.sleep(300)


def start_holder(folder: Path, *, host="", job="", reaches=True, fork=False):
    holder = FORKSERVER.Process(target=hold, args=(str(folder), host, job, reaches, fork))
    holder.start()
    for _ in range(3000):
        if (folder / "held").exists():
            return holder
        time.sleep(0.01)
    raise AssertionError("the lock was never taken")


def test_the_owner_of_a_folder_is_named_and_a_dead_one_is_no_obstacle(tmp_path):
    """Also while a worker process of the dead one lives on."""
    holder = start_holder(tmp_path, job="4711", fork=True)
    config = tiny_config(tmp_path / "config")
    with pytest.raises(ConfigError) as told:
        open_run(tmp_path, config)
    assert f"in use by process {holder.pid} on {os.uname().nodename}, SLURM job 4711" in str(
        told.value
    )
    assert "since 20" in str(told.value) and "or name another --run" in str(told.value)
    holder.kill()
    holder.join()
    started = time.monotonic()
    open_run(tmp_path, config).close()
    assert time.monotonic() - started < 2.0
    assert read_owner(tmp_path / ".lock") is None


@needs_root
def test_where_locks_do_not_reach_other_hosts_the_heartbeat_tells(tmp_path, monkeypatch, caplog):
    """An overlay: what is locked through it is not locked below it, as on NFS with nolock."""
    monkeypatch.setattr(locking, "BEAT_S", 0.2)
    monkeypatch.setattr(locking, "SILENT_S", 8.0)
    for name in ("upper", "lower", "work"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with mounted(tmp_path / "seen", "-t", "overlay", "overlay", "-o", layers) as seen:
        (seen / "held").unlink(missing_ok=True)
        holder = start_holder(seen, host="node7", reaches=False)
        below = tmp_path / "upper" / ".lock"
        with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on node7, since"):
            RunLock(below, reaches=False)
        assert "locks may not reach other hosts" in caplog.text
        holder.kill()
        holder.join()
        started = time.monotonic()
        mine = RunLock(below, reaches=False)
        assert time.monotonic() - started > 8.0
        assert f"process {holder.pid} on node7" in caplog.text and "taken over" in caplog.text
        mine.close()
    quick = RunLock(below, reaches=False)  # closed in order: nothing to wait for
    quick.close()


def test_who_has_lost_the_folder_commits_nothing(tmp_path):
    """A process that was suspended, on a file system without locks, wakes up."""
    held = RunLock(tmp_path / ".lock")
    saver = CheckpointFolder(
        tmp_path / "checkpoints", Ranks(), keep_last=1, max_refused=9, lost_to=held.lost_to
    )
    save(saver, 1)
    other = {"pid": 7, "host": "node9", "since": "2026-01-01 00:00:00", "token": "another"}
    (tmp_path / ".lock").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="has been taken over by process 7 on node9"):
        save(saver, 2)
    held.close()
    assert list_steps(tmp_path / "checkpoints") == [1]
    assert json.loads((tmp_path / ".lock").read_text()) == other, "theirs is left alone"


def test_which_file_systems_carry_locks():
    line = "36 25 0:31 / {where} rw,relatime shared:1 - {kind} server:/x {options}\n"
    root = line.format(where="/", kind="ext4", options="rw")

    def reach(kind: str, options: str = "rw") -> bool:
        mounts = root + line.format(where="/net/my\\040runs", kind=kind, options=options)
        found, name = locks_reach(Path("/net/my runs/a"), mounts)
        assert name == kind
        return found

    assert reach("nfs4", "rw,vers=4.2,local_lock=none") and reach("lustre", "rw,flock")
    assert reach("xfs") and reach("gpfs") and reach("ceph")
    assert not reach("nfs", "rw,nolock") and not reach("nfs", "rw,local_lock=all")
    assert not reach("lustre", "rw,localflock") and not reach("fuse.sshfs") and not reach("9p")
    assert locks_reach(Path("/net/my runs2"), root) == (True, "ext4")
    assert locks_reach(Path.cwd())[0], "here it is known"


def blind_rank(group, run: str, config) -> str:
    """Rank 1 is on a node that has a folder of its own under the same name."""
    running.VISIBLE_S = 1.0
    ranks = Ranks(group, group.rank(), group.size())
    if ranks.rank == 1:
        hide(Path(run).parent)
    try:
        open_run_together(Path(run), config, ranks)
    except ConfigError as error:
        return str(error)
    return "opened"


@needs_root
def test_a_folder_that_only_one_node_has_is_one_clear_line(tmp_path):
    (tmp_path / "runs").mkdir()
    config = tiny_config(tmp_path)
    told = run_ranks(2, blind_rank, str(tmp_path / "runs" / "r"), config)
    assert told[0] == told[1]
    assert "rank 1 does not see what rank 0 writes to" in told[0]
    assert "must be on a file system that all nodes share" in told[0]
