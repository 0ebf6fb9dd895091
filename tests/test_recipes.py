"""Every recipe in configs/: it parses, its model builds, its schedule ends where it should."""

import tomllib
from pathlib import Path

import pytest

from trainer.config import dump_config, load_config, parse_config
from trainer.objectives import build_model
from trainer.optim import parameter_groups
from trainer.schedule import learning_rate

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.toml"))
EPOCH_SAMPLES = 400_000_000
MS1MV3, GLINT, WF12M, WF42M = 5_179_510, 17_091_657, 12_720_066, 42_474_557  # images

# Recipe -> (million parameters, steps, peak learning rate, samples of the whole warm-up).
PUBLISHED = {
    "open_clip_vit_b32_laion400m.toml": (151, 390_625, 5e-4, 2000 * 32768),
    "datacomp_medium.toml": (151, 31_250, 5e-4, 500 * 4096),
    "datacomp_large.toml": (149, 156_250, 5e-4, 500 * 8192),
    "siglip_b16.toml": (203, 1_220_704, 1e-3, 20_000 * 32768),
}

# insightface's, read at 7fadd420: recipe -> (images, their steps of an epoch, epochs, warm-up
# epochs, batch, peak rate, identities, sample rate, weight decay, million parameters).
FACES = {
    "arcface_ms1mv3_r50": (MS1MV3, 5058, 20, 0, 1024, 0.1, 93_431, 1.0, 5e-4, 43),
    "arcface_ms1mv3_r100": (MS1MV3, 5058, 20, 0, 1024, 0.1, 93_431, 1.0, 5e-4, 65),
    "cosface_glint360k_r100": (GLINT, 16691, 20, 0, 1024, 0.1, 360_232, 1.0, 1e-4, 65),
    "cosface_webface12m_r100": (WF12M, 12421, 20, 0, 1024, 0.1, 617_970, 1.0, 5e-4, 65),
    "cosface_webface12m_r100_sampled": (WF12M, 12421, 20, 0, 1024, 0.1, 617_970, 0.1, 5e-4, 65),
    "cosface_webface12m_conflict_r50": (WF12M, 12421, 20, 2, 1024, 0.1, 1_017_970, 0.3, 5e-4, 43),
    "cosface_webface42m_r100": (WF42M, 41479, 20, 0, 1024, 0.1, 2_059_906, 0.2, 5e-4, 65),
    "cosface_webface42m_r50_bs8k": (WF42M, 5184, 20, 4, 8192, 0.6, 2_059_906, 0.2, 5e-4, 43),
    "cosface_webface42m_r100_positives": (WF42M, 2592, 20, 2, 16384, 0.4, 2_059_906, 0, 5e-4, 65),
    "cosface_webface42m_vit_b": (WF42M, 1728, 40, 4, 24576, 1e-3, 2_059_906, 0.3, 0.1, 113),
}


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # recipes name their JSON models from there


def test_the_published_recipes_are_there():
    assert set(PUBLISHED) | {f"{name}.toml" for name in FACES} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_its_schedule_is_whole(name):
    config = load_config(CONFIGS / name)
    assert parse_config(tomllib.loads(dump_config(config)), name) == config
    model = build_model(config, device="meta")
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
    model = build_model(config, device="meta")
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


@pytest.mark.parametrize("name", FACES)
def test_face_recipe_is_insightfaces(name):
    images, epoch_steps, epochs, warmup, batch, lr, classes, rate, decay, millions = FACES[name]
    config = load_config(CONFIGS / f"{name}.toml")
    model = build_model(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) // 10**6 == millions
    assert model.image_size == (112, 112) and model.embed_dim == 512
    groups = parameter_groups(model, config.optim)
    assert {group["weight_decay"] for group in groups} == {decay}  # gains and biases too
    assert config.centers.weight_decay == decay
    assert config.centers.optimizer == config.optim.name
    assert (config.optim.lr, config.optim.clip_norm, config.loss.scale) == (lr, 5.0, 64.0)
    assert config.loss.margin == (0.5 if config.loss.name == "arcface" else 0.4)
    assert config.centers.num_classes == classes
    assert int(config.centers.sample_rate * classes) == int(rate * classes)
    assert rate == 1.0 or (config.centers.mode == "exact" and not config.centers.correction)

    assert config.train.global_batch_size == batch and images // batch == epoch_steps
    steps = config.train.duration.to_steps(batch, images)
    assert 0 <= steps - epoch_steps * epochs <= epochs  # they drop what is left of an epoch
    total = config.train.duration.to_samples(batch, images)
    assert config.schedule.warmup.to_samples(batch, images) == warmup * images
    for step in (warmup * epoch_steps + warmup, steps // 2, steps - 1):
        theirs = 1 - (step - warmup * epoch_steps) / (epoch_steps * (epochs - warmup))
        factor = learning_rate(
            config.schedule, step * batch, total, global_batch_size=batch, epoch_samples=images
        )
        assert factor == pytest.approx(theirs, abs=2e-3)


def test_face_recipes_say_where_they_come_from():
    for name in FACES:
        comment = (CONFIGS / f"{name}.toml").read_text().split("\n\n")[0]
        assert "insightface 7fadd420" in comment and "Hardware:" in comment
        assert name == "arcface_ms1mv3_r50" or "arcface_ms1mv3_r50.toml" in comment
