"""The configuration: every error at once with the nearest keys, TOML out that reads back."""

import tomllib
from pathlib import Path

import pytest

from trainer.config import (
    Config,
    ConfigError,
    differing_keys,
    dump_config,
    load_config,
    load_overrides,
    parse_config,
)
from trainer.duration import Duration

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


def test_every_error_is_told_at_once_with_the_nearest_keys():
    tree = {
        "optm": {"lr": 1.0},
        "optim": {"lrr": 1.0, "lr": -1.0},
        "train": {"duration": "4 parsecs", "global_batch_siz": 4},
    }
    with pytest.raises(ConfigError) as error:
        parse_config(tree, "run.toml")
    text = str(error.value)
    for said in (
        "unknown key optm; nearest: optim",
        "unknown key optim.lrr; nearest: optim.lr",
        "unknown key train.global_batch_siz; nearest: train.global_batch_size",
        "optim.lr = -1.0",
        "'4 parsecs' is not a duration",
    ):
        assert said in text
    assert all(line.startswith("run.toml: ") for line in text.splitlines())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dump_reads_back_equal(path):
    config = load_config(path)
    again = parse_config(tomllib.loads(dump_config(config)), "dump")
    assert again == config and differing_keys(config, again) == []


def test_dump_survives_odd_values():
    tree = {
        "data": {
            "sources": [
                {"shards": 'a"b\\c\n\u2028.tar', "weight": 0.25},
                {"shards": ["x.tar", "y.tar"], "weight": 3},
            ]
        },
        "model": {"max_scale": "inf"},
        "optim": {"lr": 1e-7},
        "eval": {"templates": ["a {} \u00e9", ""]},
    }
    config = parse_config(tree, "odd")
    assert parse_config(tomllib.loads(dump_config(config)), "dump") == config


def test_overrides_by_the_type_of_the_field():
    config = load_overrides(
        [
            "--optim.lr=3e-4",
            "--model.name=ViT-B-32",
            "--train.duration=3 epochs",
            "--log.samples=true",
            "--optim.betas=[0.9, 0.95]",
            "--data.augment.flip=0.5",
        ]
    )
    assert config.optim.lr == 3e-4 and config.optim.betas == (0.9, 0.95)
    assert config.train.duration == Duration("3 epochs")
    assert config.log.samples and config.data.augment.flip == 0.5


def test_shards_that_a_shell_expanded_belong_together():
    config = load_overrides(["--data.shards=a-0.tar", "--data.shards=a-1.tar"])
    assert config.data.shards == ["a-0.tar", "a-1.tar"]
    with pytest.raises(ConfigError, match=r"--optim.lr is given 2 times"):
        load_overrides(["--optim.lr=1", "--optim.lr=2"])


@pytest.mark.parametrize("override", ["--verbose", "--lr=1", "optim.lr"])
def test_a_wrong_override_says_how_one_is_written(override):
    with pytest.raises(ConfigError, match=r"--section.key=value"):
        load_overrides([override])


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "smoke.toml").write_text("")
    with pytest.raises(ConfigError, match=r"smok.toml: no such file; did you mean smoke.toml"):
        load_config(tmp_path / "smok.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match="not readable as TOML"):
        load_config(tmp_path / "broken.toml")


def test_a_model_file_is_found_from_the_configuration(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.json").write_text("{}")
    (tmp_path / "run.toml").write_text('[model]\nname = "models/m.json"\n')
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "run.toml").model.name == str(tmp_path / "models" / "m.json")


@pytest.mark.parametrize(
    ("text", "samples"),
    [("40 steps", 400), ("1 step", 10), ("2 epochs", 2000), ("1e3 samples", 1000)],
)
def test_durations(text, samples):
    assert Duration(text).to_samples(10, 1000) == samples
    assert Duration(str(Duration(text))) == Duration(text)


def test_durations_round_up_to_steps():
    assert Duration("11 samples").to_steps(10, 1000) == 2
    assert Duration("0.001 epochs").to_steps(10, 1000) == 1
    with pytest.raises(ValueError, match="no length in samples"):
        Duration("5 minutes").to_samples(10, 1000)


def test_fields_that_do_not_fit_name_the_way_out():
    for tree, said in (
        ({"zero": {"offload_param": "cpu"}}, "needs zero.stage = 3"),
        ({"loss": {"name": "siglip", "label_smoothing": 0.1}}, 'needs loss.name = "clip"'),
        ({"data": {"shards": "a", "sources": [{"shards": "b"}]}}, "not both"),
        ({"train": {"duration": "5 minutes"}}, "not minutes"),
        ({"negatives": {"explicit": 2}}, "explicit = 2: it is for texts against labels"),
        ({"negatives": {"explicit": 2}, "loss": {"name": "cosface"}}, "is none of these"),
        (explicit(labels={"over": "all"}), 'labels.over = "batch", where labels'),
        (explicit(labels={"rows": "classifiers"}), "classifiers and all labels"),
        (explicit(data={"batching": "plain"}), 'set data.batching = "planned"'),
        (explicit(negatives={"explicit": 1, "planner": "random"}), 'other than "random"'),
        ({"negatives": {"weights": "w.parquet"}}, "losses of texts against labels are weighted"),
        (explicit(data={"batching": "plain"}, negatives={"weights": "w"}), "lie in plans"),
        (explicit(negatives={"margins": "m.parquet"}), 'negatives.planner = "topics" balances'),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(tree, "x")


def explicit(**sections: dict) -> dict:
    """A run whose samples bring negatives along, but for `sections`."""
    tree = {"data": {"batching": "planned"}, "loss": {"name": "decoupled"}}
    return {**tree, "negatives": {"explicit": 1}, **sections}


def test_samples_that_bring_negatives_along():
    assert parse_config(explicit(), "x").negatives.explicit == 1


def test_there_are_few_enough_fields():
    def count(model) -> int:
        return sum(
            count(field.annotation) if hasattr(field.annotation, "model_fields") else 1
            for field in model.model_fields.values()
        )

    sections = {name: count(field.annotation) for name, field in Config.model_fields.items()}
    assert max(sections.values()) <= 45, sections
    assert sum(sections.values()) <= 220, sections
