"""A step in chunks is the whole step; keyed dropout knows nothing of chunks and ranks."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_runs import read_losses, tiny_config, train_rank
from torch import nn

from trainer.dropout import (
    KeyedDropout,
    KeyedPatchDropout,
    keyed_uniform,
    make_dropout_keyed,
    mix32,
    row_keys,
    use_row_keys,
)


def losses_of(folder: Path, name: str, world_size: int, **sections: dict) -> dict[int, float]:
    run = folder / name
    run_ranks(world_size, train_rank, tiny_config(folder, **sections), str(run))
    return read_losses(run)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_chunks_equal_the_whole_step_with_dropout_on(tmp_path, stage):
    sections = {"model": {"patch_dropout": 0.5}, "zero": {"stage": stage}}
    train = {"duration": "5 steps", "precision": "fp32"}
    whole = losses_of(tmp_path, "whole", 1, train=train, **sections)
    chunked = losses_of(tmp_path, "chunks", 1, train={**train, "chunk_size": 5}, **sections)
    two_ranks = losses_of(tmp_path, "ranks", 2, train={**train, "chunk_size": 3}, **sections)
    for step, loss in whole.items():
        assert chunked[step] == pytest.approx(loss, abs=2e-5)
        assert two_ranks[step] == pytest.approx(loss, abs=2e-5)


def test_dropout_changes_the_loss(tmp_path):
    train = {"duration": "1 steps"}
    plain = losses_of(tmp_path, "plain", 1, train=train)
    dropped = losses_of(tmp_path, "dropped", 1, train=train, model={"patch_dropout": 0.5})
    assert abs(plain[1] - dropped[1]) > 1e-4


def test_bf16_stays_near_float32(tmp_path):
    train = {"duration": "5 steps"}
    exact = losses_of(tmp_path, "fp32", 1, train=train)
    low = losses_of(tmp_path, "bf16", 2, train={**train, "precision": "bf16"})
    for step, loss in exact.items():
        assert low[step] == pytest.approx(loss, abs=0.05)
    assert low != exact


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_finds_its_loss_scale_and_learns(tmp_path, stage):
    train = {"duration": "12 steps", "precision": "fp16", "max_skipped": 0}
    losses = losses_of(tmp_path, "fp16", 2, train=train, zero={"stage": stage})
    assert losses[12] < losses[1] - 0.5
    lines = [json.loads(line) for line in (tmp_path / "fp16" / "metrics.jsonl").open()]
    assert 0 < max(line.get("skipped_steps", 0) for line in lines) < 8


def test_mix32_is_a_bijection():
    some = torch.arange(1 << 20) * 4096 + 17
    assert mix32(some).unique().numel() == some.numel()
    assert 0 <= int(mix32(some).min()) and int(mix32(some).max()) < 2**32


def test_keyed_uniform_is_uniform_and_uncorrelated():
    keys = row_keys(3, torch.arange(400))
    first, second = keyed_uniform(keys, 0, (400, 500)), keyed_uniform(keys, 1, (400, 500))
    for draws in (first, second):
        counts = torch.histc(draws, bins=20, min=0, max=1) / draws.numel()
        assert (counts - 0.05).abs().max() < 0.002
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_masks_follow_the_sample_not_the_batch():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Dropout(0.3))
    make_dropout_keyed(model)
    assert isinstance(model[1], KeyedDropout) and model[1].layer != model[3].layer
    x, keys = torch.randn(10, 4), row_keys(0, torch.arange(100, 110))
    use_row_keys(model, keys)
    whole = model(x)
    order = torch.randperm(10)
    use_row_keys(model, keys[order])
    torch.testing.assert_close(model(x[order]), whole[order])
    model.eval()
    torch.testing.assert_close(model(x), model[2](model[0](x)))


def test_patch_dropout_keeps_prefix_and_share():
    layer = KeyedPatchDropout(0.75, 0, num_prefix_tokens=1)
    layer.keys = row_keys(0, torch.arange(6))
    tokens = torch.arange(17.0)[None, :, None].expand(6, 17, 3)
    kept = layer(tokens)
    assert kept.shape == (6, 5, 3) and (kept[:, 0] == 0).all()
    assert len({tuple(row[:, 0].tolist()) for row in kept}) > 1


def test_row_keys_must_match_the_rows():
    layer = KeyedDropout(0.5, 0)
    with pytest.raises(ValueError, match="3 rows in training but row keys for none"):
        layer(torch.ones(3, 2))
