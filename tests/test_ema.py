"""Averages of weights and of batch norms' statistics are the plain recursion over the steps."""

import shutil

import pytest
import torch
from ranks import run_ranks
from tiny_faces import face_config
from tiny_runs import train_rank

from trainer.checkpoint import load_averages, load_weights
from trainer.models.faces import build_face_model

DECAY, STEPS = 0.3, 4


@pytest.mark.parametrize("stage", [0, 3])
def test_averages_are_the_recursion_over_saved_steps(tmp_path, stage):
    config = face_config(
        tmp_path,
        model={"name": "timm:test_efficientnet"},
        optim={"name": "sgd", "lr": 0.05},
        train={"duration": f"{STEPS} steps", "ema": DECAY},
        checkpoint={"every": "1 steps", "keep_last": STEPS},
        zero={"stage": stage},
    )
    run_ranks(2, train_rank, config, str(tmp_path / "run"))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(folders) == STEPS
    start = build_face_model(config.model, seed=config.train.seed)
    trained = {name for name, p in start.named_parameters() if p.requires_grad}
    expected = {
        name: tensor.clone()
        for name, tensor in start.state_dict().items()
        if name in trained or "running" in name
    }
    for step, folder in enumerate(folders, 1):
        weights, averages = load_weights(folder), load_averages(folder)
        share = 1 - min(DECAY, (1 + step) / (10 + step))
        for name, average in expected.items():
            average.lerp_(weights[name], share)
        assert averages.keys() == expected.keys()
        for name, average in averages.items():
            assert (average - expected[name]).abs().max() < 1e-5, (step, name)
        together = load_weights(folder, ema=True)
        assert all(torch.equal(together[name], averages[name]) for name in averages)

    resumed = tmp_path / "resumed" / "checkpoints"
    shutil.copytree(tmp_path / "run" / "checkpoints", resumed)
    shutil.rmtree(resumed / folders[-1].name)
    run_ranks(2, train_rank, config, str(resumed.parent))
    found = load_averages(resumed / folders[-1].name)
    for name, average in load_averages(folders[-1]).items():
        assert (found[name] - average).abs().max() < 1e-6, name
