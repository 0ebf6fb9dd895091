"""A checkpoint on another number of ranks: not only the losses, all that was learnt is the same."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_faces import face_config
from tiny_runs import read_losses, tiny_config, train_rank

from trainer.centers.files import StoredCenters
from trainer.checkpoint import find_newest, load_averages, load_weights
from trainer.export.formats import export_checkpoint
from trainer.export.onnx_file import OnnxOptions

STEPS, KILLED_AFTER = 8, 5
CASES = [
    (2, 3, 2, {"name": "sgd", "lr": 0.03}, {"optimizer": "sgd", "mode": "exact"}),
    (2, 1, 3, {"name": "adamw"}, {"optimizer": "adamw", "lr_scale": 1.0, "subcenters": 2}),
    (1, 2, 1, {"name": "sgd", "lr": 0.03}, {"optimizer": "adagrad", "sample_rate": 0.8}),
]


@pytest.mark.parametrize(("first", "then", "stage", "optim", "centers"), CASES, ids=str)
def test_weights_averages_centers_and_momentum_are_the_same(
    tmp_path, first, then, stage, optim, centers
):
    config = face_config(
        tmp_path,
        zero={"stage": stage},
        optim=optim,
        centers=centers,
        train={"duration": f"{STEPS} steps", "ema": 0.9},
        checkpoint={"every": "4 steps"},
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(first, train_rank, config, str(whole))
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(first, train_rank, config, str(run), KILLED_AFTER)
    assert run_ranks(then, train_rank, config, str(run)) == [True] * then
    losses, expected = read_losses(run), read_losses(whole)
    assert losses == {step: pytest.approx(loss, abs=1e-4) for step, loss in expected.items()}
    ended, as_meant = (find_newest(folder / "checkpoints") for folder in (run, whole))
    assert ended is not None and as_meant is not None and ended.name == "step-00000008"
    for read in (load_weights, load_averages):
        found, meant = read(ended), read(as_meant)
        assert found.keys() == meant.keys() and found
        for name, tensor in found.items():
            assert torch.allclose(tensor, meant[name], atol=3e-4), name
    mine, theirs = StoredCenters.open(ended), StoredCenters.open(as_meant)
    assert len(mine.parts) == then and len(theirs.parts) == first
    assert mine.tables == theirs.tables and len(mine.tables) > 1, "rows and what moves them"
    for table in mine.tables:
        found, meant = (s.read(table, 0, s.num_classes).double() for s in (mine, theirs))
        assert torch.allclose(found, meant, atol=1e-4), table


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run of another seed: no other process would draw its weights."""
    folder = tmp_path_factory.mktemp("start")
    config = tiny_config(folder, train={"duration": "2 steps", "seed": 7})
    run_ranks(1, train_rank, config, str(folder / "run"))
    export_checkpoint(folder / "run", folder / "out", "open_clip", OnnxOptions(), ema=True)
    return folder


@pytest.mark.parametrize(("first", "then", "stage"), [(2, 1, 1), (1, 2, 2), (2, 3, 3)])
def test_a_locked_tower_keeps_its_start_weights(start, tmp_path, first, then, stage):
    (weights,) = (start / "out").glob("*.safetensors")
    config = tiny_config(
        tmp_path,
        model={"lock_image": True, "pretrained": str(weights)},
        zero={"stage": stage},
        train={"duration": "6 steps"},
        checkpoint={"every": "3 steps"},
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ranks(first, train_rank, config, str(whole))
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(first, train_rank, config, str(run), 4)
    assert run_ranks(then, train_rank, config, str(run)) == [True] * then
    losses, expected = read_losses(run), read_losses(whole)
    assert losses == {step: pytest.approx(loss, abs=1e-4) for step, loss in expected.items()}
    found, meant = (load_weights(find_newest(f / "checkpoints")) for f in (run, whole))
    given = load_weights(find_newest(start / "run" / "checkpoints"))
    frozen = [name for name in found if ".visual." in name]
    assert len(frozen) > 10
    for name in frozen:
        assert torch.equal(found[name], meant[name]) and torch.equal(found[name], given[name]), name
