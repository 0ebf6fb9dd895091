"""Runs of texts against labels: they learn, and go on exactly on any number of ranks."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, train_rank
from tiny_texts import NUM_LABELS, text_config

from data.errors import DataError
from trainer.centers.label_rows import read_label_rows
from trainer.centers.parts import Part
from trainer.checkpoint import find_checkpoint, load_checkpoint_config, load_weights
from trainer.config import ConfigError
from trainer.export import OnnxOptions
from trainer.export.formats import export_checkpoint
from trainer.hardness import Hardness
from trainer.models import build_text_model
from trainer.models.texts.build import restore_text_model
from trainer.models.texts.label_texts import embed_labels, tokenize_labels
from trainer.objectives import build_model
from trainer.objectives.label_sides import build_label_objective, load_label_table
from trainer.ranks import Ranks
from trainer.samples import build_samples

STEPS, KILLED_AFTER = 6, 5
ALL_TEXTS = {"labels": {"rows": "texts", "over": "all"}}
BATCH_TEXTS = {"labels": {"rows": "texts", "over": "batch"}}
ALL_ROWS = {"labels": {"rows": "classifiers", "over": "all"}}
BATCH_ROWS = {"labels": {"rows": "classifiers", "over": "batch"}}
DROPOUT = {"dropout": 0.1, "token_dropout": 0.2}
SIDES = {
    "all texts": {
        **ALL_TEXTS,
        "loss": {"name": "soft_topk"},
        "model": {**DROPOUT, "token_weights": True},
        "zero": {"stage": 1},
        "train": {"chunk_size": 5, "ema": 0.9},
    },
    "batch texts": {
        **BATCH_TEXTS,
        "loss": {"name": "info_nce"},
        "model": {"dropout": 0.1, "name": "transformer", "heads": 2, "shared_towers": False},
        "zero": {"stage": 3},
        "train": {"chunk_size": 3},
    },
    "all classifiers": {
        **ALL_ROWS,
        "model": DROPOUT,
        "loss": {"name": "one_vs_all"},
        "centers": {"optimizer": "adamw", "mode": "exact", "weight_decay": 0.1},
        "zero": {"stage": 2},
    },
    "batch classifiers": {
        **BATCH_ROWS,
        "loss": {"name": "topk_hinge", "topk": 3},
        "model": {**DROPOUT, "lock_text": True},
        "centers": {"mode": "exact", "dtype": "bfloat16", "weight_decay": 5e-3},
        "zero": {"stage": 0},
    },
}


def config_of(folder: Path, side: str):
    sections = SIDES[side]
    train = {"duration": f"{STEPS} steps", **sections.get("train", {})}
    return text_config(folder, **{**sections, "train": train, "checkpoint": {"every": "3 steps"}})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Each side's run once, whole and killed, on two ranks: `runs(side)` -> (whole, killed)."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make(side: str) -> tuple[Path, Path]:
        if side not in made:
            config, name = config_of(folder, side), side.replace(" ", "-")
            whole, killed = folder / name, folder / f"{name}-killed"
            run_ranks(2, train_rank, config, str(whole))
            with pytest.raises(AssertionError, match="exit codes"):
                run_ranks(2, train_rank, config, str(killed), KILLED_AFTER)
            made[side] = (whole, killed)
        return made[side]

    return make


@pytest.mark.parametrize(
    ("side", "then"),
    [
        *((side, then) for side in SIDES for then in (2, 1)),
        ("all texts", 3),
        ("all classifiers", 3),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, tmp_path, side, then):
    whole, killed = runs(side)
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    assert run_ranks(then, train_rank, config_of(whole.parent, side), str(run)) == [True] * then
    assert "step-00000003" in (run / "log" / "rank-0000.log").read_text()
    assert read_samples(run) == read_samples(whole)
    expected, found = read_losses(whole), read_losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    if then == 2:
        assert found == expected
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=2e-4, abs=1e-4), f"step {step}"


@pytest.mark.parametrize(
    ("sections", "stage"),
    [
        (ALL_TEXTS, 3),
        (ALL_TEXTS | {"model": {"shared_towers": False}}, 1),
        (BATCH_ROWS, 2),
    ],
    ids=str,
)
def test_a_step_in_chunks_on_any_ranks_is_the_whole_step(tmp_path, sections, stage):
    found = []
    for ranks, chunk_size in ((1, 0), (1, 4), (2, 2)):
        config = text_config(
            tmp_path,
            **{**sections, "model": {**DROPOUT, **sections.get("model", {})}},
            zero={"stage": stage},
            train={"duration": "3 steps", "chunk_size": chunk_size},
        )
        run = tmp_path / f"{ranks}-{chunk_size}"
        run_ranks(ranks, train_rank, config, str(run))
        found.append(read_losses(run))
    for losses in found[1:]:
        assert losses == {step: pytest.approx(loss, rel=1e-4) for step, loss in found[0].items()}


def build_alone(config, ranks):
    """The objective of a run's start, without an engine."""
    hardness = Hardness(0, ranks.group, due=lambda _: False)
    return build_label_objective(
        config, build_model(config), SimpleNamespace(), build_samples(config), ranks, hardness,
        draw=True,
    )  # fmt: skip


def first_rows_rank(group, config):
    """This rank's classifiers as a run starts with them."""
    ranks = Ranks(group, group.rank(), group.size(), group.rank())
    return build_alone(config, ranks).rows.unit_rows()


def test_it_learns_and_its_label_embeddings_start_classifiers(tmp_path):
    config = text_config(tmp_path, **ALL_TEXTS, train={"duration": "40 steps", "ema": 0.5})
    run_ranks(2, train_rank, config, str(tmp_path / "texts"))
    losses = read_losses(tmp_path / "texts")
    assert losses[40] < 0.5 * losses[1]
    checkpoint = find_checkpoint(tmp_path / "texts")
    model = restore_text_model(
        load_weights(checkpoint, ema=True), load_checkpoint_config(checkpoint)
    )
    table = load_label_table(config)
    expected = embed_labels(model, tokenize_labels(table, model.tokenizer_spec, 0, NUM_LABELS))
    rows = text_config(
        tmp_path,
        labels={"rows": "classifiers", "over": "all", "init": str(tmp_path / "texts")},
        model={"pretrained": str(tmp_path / "texts")},
    )
    started = torch.cat(run_ranks(3, first_rows_rank, rows))
    torch.testing.assert_close(started, expected)
    run_ranks(1, train_rank, rows, str(tmp_path / "rows"))
    second = read_losses(tmp_path / "rows")
    assert second[1] < 0.5 * losses[1]
    stored = read_label_rows(find_checkpoint(tmp_path / "rows"), Part(0, NUM_LABELS, NUM_LABELS))
    again = text_config(tmp_path, labels={**ALL_ROWS["labels"], "init": str(tmp_path / "rows")})
    torch.testing.assert_close(run_ranks(1, first_rows_rank, again)[0], stored)
    for name, source in (("texts", expected), ("rows", stored)):
        _check_exports(tmp_path, name, source)


def _check_exports(folder: Path, name: str, rows: torch.Tensor) -> None:
    out = folder / name
    onnx = OnnxOptions()
    export_checkpoint(out, folder / f"{name}.parquet", "labels", onnx, ema=True)
    written = pq.read_table(folder / f"{name}.parquet")
    assert written["label"].to_pylist() == list(range(NUM_LABELS))
    assert written["text"][3].as_py().startswith("w3x0")
    torch.testing.assert_close(torch.tensor(written["embedding"].to_pylist()), rows)
    file = folder / f"{name}.safetensors"
    export_checkpoint(out, file, "", onnx, ema=True)
    config = text_config(folder, model={"pretrained": str(file)})
    taken = build_text_model(config.model, loss_name="decoupled").eval()
    weights = load_weights(find_checkpoint(out), ema=True)
    assert torch.equal(taken.towers["texts"].proj.weight, weights["towers.texts.proj.weight"])
    with pytest.raises(ConfigError, match="becomes safetensors, labels"):
        export_checkpoint(out, file, "onnx", onnx, ema=True)


def test_what_does_not_fit_is_one_error_before_the_first_step(tmp_path):
    short = tmp_path / "short.parquet"
    text_config(tmp_path)
    table = pq.read_table(tmp_path / "texts" / "labels.parquet")
    pq.write_table(table.slice(0, 9), short)
    cases = {
        "that label has no text": {"labels": {"table": str(short)}},
        "no such file": {"labels": {"table": "/nowhere/labels.parquet"}},
        "no such folder": {"labels": {**ALL_ROWS["labels"], "init": "/nowhere"}},
        "a tower starts from model.pretrained": {"labels": {"init": "/nowhere"}},
        "centers.sample_rate": {**ALL_ROWS, "centers": {"sample_rate": 0.5}},
    }
    for message, sections in cases.items():
        with pytest.raises((ConfigError, DataError), match=message):
            build_alone(text_config(tmp_path, **sections), Ranks(None, 0, 1, 0))


def config_error(group, config, run):
    try:
        train_rank(group, config, run)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def test_a_resumed_run_keeps_its_labels(tmp_path):
    """Other labels than those it was trained with are refused, by their number and their texts."""
    config = text_config(tmp_path, **ALL_ROWS, train={"duration": "4 steps"})
    run_ranks(1, train_rank, config, str(tmp_path / "run"))
    table = pq.read_table(tmp_path / "texts" / "labels.parquet")
    more = table.slice(0, 1).to_pylist()[0] | {"label": NUM_LABELS}
    longer = pa.concat_tables([table, pa.Table.from_pylist([more], table.schema)])
    pq.write_table(longer, tmp_path / "texts" / "labels.parquet")
    (text,) = run_ranks(1, config_error, config, str(tmp_path / "run"))
    assert "23 labels, this one has 24" in text
    texts = [*table["text"].to_pylist()[:-1], "another meaning"]
    other = table.set_column(1, "text", pa.array(texts, pa.large_string()))
    pq.write_table(other, tmp_path / "texts" / "labels.parquet")
    (text,) = run_ranks(1, config_error, config, str(tmp_path / "run"))
    assert "another label table" in text
