"""A checkpoint is whole or does not exist: faults at every place, what the next start says."""

import json
import logging
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import read_losses, tiny_config, train_rank

from trainer import durable
from trainer.checkpoint import (
    CheckpointError,
    TrainState,
    check,
    find_checkpoint,
    find_newest,
    list_steps,
)
from trainer.ranks import Ranks
from trainer.saving import CheckpointFolder


def save_some(folder: Path, steps: range, **options) -> CheckpointFolder:
    saver = CheckpointFolder(folder, Ranks(), keep_last=options.pop("keep_last", 10), **options)
    for step in steps:
        state = TrainState(fingerprint="f", world_size=1, zero_stage=0, step=step)
        saver.save(state, "", {"deepspeed/x.pt": {"w": torch.full((1000,), float(step))}})
    saver.wait()
    return saver


@pytest.mark.parametrize("background", [False, True])
def test_whole_checkpoints_pass_the_check(tmp_path, background):
    save_some(tmp_path, range(1, 4), background=background)
    assert list_steps(tmp_path) == [1, 2, 3]
    assert [check(tmp_path / f"step-{step:08d}") for step in (1, 2, 3)] == ["", "", ""]
    loaded = torch.load(tmp_path / "step-00000002" / "deepspeed" / "x.pt")
    assert loaded["w"][0] == 2.0
    assert not list(tmp_path.glob(".*"))


def test_background_save_is_of_the_moment_it_was_asked(tmp_path):
    saver = CheckpointFolder(tmp_path, Ranks(), keep_last=1, background=True)
    weights = torch.zeros(1_000_000)
    saver.save(TrainState("f", 1, 0, step=1), "", {"w.pt": weights})
    weights.fill_(7.0)
    saver.wait()
    assert torch.load(tmp_path / "step-00000001" / "w.pt").abs().max() == 0


def test_pruning_keeps_the_last_and_the_multiples(tmp_path):
    save_some(tmp_path, range(1, 11), keep_last=2, keep_every=4)
    assert list_steps(tmp_path) == [4, 8, 9, 10]


def damage_truncate(path: Path) -> str:
    file = path / "deepspeed" / "x.pt"
    file.write_bytes(file.read_bytes()[:-10])
    return "bytes, "


def damage_flip(path: Path) -> str:
    file = path / "deepspeed" / "x.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "does not match its checksum"


def damage_remove(path: Path) -> str:
    (path / "deepspeed" / "x.pt").unlink()
    return "x.pt is missing"


def damage_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("{")
    return "manifest.json is not readable"


def damage_unfinished(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "never finished"


DAMAGES = [damage_truncate, damage_flip, damage_remove, damage_manifest, damage_unfinished]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_by_name(tmp_path, damage, caplog):
    save_some(tmp_path, range(1, 4))
    said = damage(tmp_path / "step-00000003")
    with caplog.at_level(logging.WARNING, logger="nsphere.checkpoint"):
        assert find_newest(tmp_path) == tmp_path / "step-00000002"
    assert "step-00000003" in caplog.text and said in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_before_the_damage(tmp_path, damage):
    run, whole = tmp_path / "run", tmp_path / "whole"
    config = tiny_config(tmp_path)
    run_ranks(1, train_rank, config, str(whole))
    with pytest.raises(AssertionError):
        run_ranks(1, train_rank, config, str(run), 10)
    newest = run / "checkpoints" / "step-00000008"
    if damage in (damage_truncate, damage_flip, damage_remove):
        big = next((newest / "deepspeed").glob("*optim*"))
        big.rename(newest / "deepspeed" / "x.pt")
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"]["deepspeed/x.pt"] = manifest["files"].pop(f"deepspeed/{big.name}")
        (newest / "manifest.json").write_text(json.dumps(manifest))
    damage(newest)
    assert run_ranks(1, train_rank, config, str(run)) == [True]
    assert read_losses(run) == read_losses(whole)
    log = (run / "log" / "rank-0000.log").read_text()
    assert "skipping checkpoint" in log and "step-00000008" in log
    assert "going on from" in log and "step-00000004" in log


def die_inside_save(group, folder: str, after_bytes: int) -> None:
    """Save a good checkpoint, then die by SIGKILL inside the next save."""
    ranks = Ranks(group, group.rank(), group.size())
    saver = CheckpointFolder(Path(folder), ranks, keep_last=5)
    files = {f"deepspeed/rank_{ranks.rank}.pt": torch.zeros(100_000)}
    saver.save(TrainState("f", ranks.world_size, 1, step=1), "", files)
    write, written = durable.HashingFile.write, 0

    def dying_write(self, data):
        nonlocal written
        written += memoryview(data).nbytes
        if ranks.rank == 1 and written > after_bytes:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    durable.HashingFile.write = dying_write
    saver.save(TrainState("f", ranks.world_size, 1, step=2), "", files)


@pytest.mark.parametrize("after_bytes", [0, 1000, 300_000])
def test_kill_inside_a_save_leaves_the_last_checkpoint(tmp_path, after_bytes, caplog):
    with pytest.raises(AssertionError):
        run_ranks(2, die_inside_save, str(tmp_path), after_bytes)
    reader = CheckpointFolder(tmp_path, Ranks(), keep_last=5)
    with caplog.at_level(logging.WARNING, logger="nsphere.checkpoint"):
        assert reader.newest() == tmp_path / "step-00000001"
    assert "the run was stopped inside this save" in caplog.text
    assert list_steps(tmp_path) == [1] and not list(tmp_path.glob(".saving-*"))


def fill_disk(group, folder: str, full_rank: int) -> str:
    """One rank's disk is full in the second save; what every rank is told."""
    ranks = Ranks(group, group.rank(), group.size())
    saver = CheckpointFolder(Path(folder), ranks, keep_last=5)
    files = {f"deepspeed/zero_pp_rank_{ranks.rank}_x.pt": torch.zeros(100_000)}
    saver.save(TrainState("f", ranks.world_size, 1, step=1), "", files)
    if ranks.rank == full_rank:  # the kernel refuses, as it does for a full disk or a quota
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        saver.save(TrainState("f", ranks.world_size, 1, step=2), "", files)
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("full_rank", [0, 1])
def test_full_disk_of_any_rank_is_told_to_all(tmp_path, full_rank):
    start = time.monotonic()
    told = run_ranks(2, fill_disk, str(tmp_path), full_rank)
    assert time.monotonic() - start < 60
    for text in told:
        assert "step-00000002: not saved" in text and "File too large" in text
    assert list_steps(tmp_path) == [1] and not list(tmp_path.glob(".saving-*"))


def test_find_checkpoint_says_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="without a whole checkpoint"):
        find_checkpoint(tmp_path)
    save_some(tmp_path / "checkpoints", range(1, 3))
    assert find_checkpoint(tmp_path).name == "step-00000002"
    one = tmp_path / "checkpoints" / "step-00000001"
    assert find_checkpoint(one) == one
