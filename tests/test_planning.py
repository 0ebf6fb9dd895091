"""Planning while training: whole small runs, killed and resumed, on one rank and on more."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, tiny_config, train_rank

STEPS = 14
PLANNED = {"data": {"batching": "planned"}, "train": {"duration": f"{STEPS} steps"}}


def planned_config(folder: Path, negatives: dict, **sections: dict):
    """60 samples, 16 a batch: epochs end inside batches 3, 7 and 11."""
    sections = {name: {**PLANNED.get(name, {}), **sections.get(name, {})} for name in {*PLANNED, *sections}}
    return tiny_config(folder, negatives=negatives, **sections)


def run(folder: Path, name: str, world_size: int, negatives: dict, **sections: dict) -> Path:
    run_ranks(world_size, train_rank, planned_config(folder, negatives, **sections), str(folder / name))
    return folder / name


def test_epochs(tmp_path):
    path = run(tmp_path, "one", 1, {"start_epoch": 1})
    keys = [key for step in range(1, STEPS + 1) for key in read_samples(path)[step]]
    for epoch in range(3):
        assert len(set(keys[epoch * 60 : (epoch + 1) * 60])) == 60
    assert all(len(set(b)) == 16 for b in read_samples(path).values())
