"""Every recipe in configs/: it parses, its model builds, its schedule ends where it should."""

import tomllib
from pathlib import Path

import pytest

from trainer.config import dump_config, load_config, parse_config
from trainer.models import build_model
from trainer.optim import parameter_groups
from trainer.schedule import learning_rate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.toml"))
EPOCH_SAMPLES = 400_000_000

# Recipe -> (million parameters, steps, peak learning rate, samples of the whole warm-up).
PUBLISHED = {
    "open_clip_vit_b32_laion400m.toml": (151, 390_625, 5e-4, 2000 * 32768),
    "datacomp_medium.toml": (151, 31_250, 5e-4, 500 * 4096),
    "datacomp_large.toml": (149, 156_250, 5e-4, 500 * 8192),
    "siglip_b16.toml": (203, 1_220_704, 1e-3, 20_000 * 32768),
}


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # recipes name their JSON models from there


def test_the_published_recipes_are_there():
    assert set(PUBLISHED) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_its_schedule_is_whole(name):
    config = load_config(CONFIGS / name)
    assert parse_config(tomllib.loads(dump_config(config)), name) == config
    model = build_model(config.model, loss_name=config.loss.name, device="meta")
    groups = parameter_groups(model, config.optim)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())

    batch = config.train.global_batch_size
    steps = config.train.duration.to_steps(batch, EPOCH_SAMPLES)
    total = config.train.duration.to_samples(batch, EPOCH_SAMPLES)
    walk = [
        learning_rate(
            config.schedule,
            step * batch,
            total,
            global_batch_size=batch,
            epoch_samples=EPOCH_SAMPLES,
        )
        for step in range(0, steps, max(1, steps // 5000))
    ]
    assert all(0 < factor <= 1 for factor in walk)
    assert max(walk) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_is_the_published_one(name):
    million_parameters, steps, lr, warmup_samples = PUBLISHED[name]
    config = load_config(CONFIGS / name)
    model = build_model(config.model, loss_name=config.loss.name, device="meta")
    assert sum(p.numel() for p in model.parameters()) // 10**6 == million_parameters
    batch = config.train.global_batch_size
    assert config.train.duration.to_steps(batch, EPOCH_SAMPLES) == steps
    assert config.schedule.warmup.to_samples(batch, EPOCH_SAMPLES) == warmup_samples
    assert config.optim.lr == lr

    def factor(samples_seen):
        return learning_rate(
            config.schedule,
            samples_seen,
            config.train.duration.to_samples(batch, EPOCH_SAMPLES),
            global_batch_size=batch,
            epoch_samples=EPOCH_SAMPLES,
        )

    assert factor(0) == batch / warmup_samples
    assert factor(warmup_samples - batch) == factor(warmup_samples) == 1.0
    assert 0 < factor((steps - 1) * batch) < 1e-6
