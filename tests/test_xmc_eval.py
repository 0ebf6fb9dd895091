"""Task xmc as a whole: from shards and a model to figures, a file, and clear errors."""

import builtins
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import xmc_oracles
from dealt_rows import DEALS
from ranks import run_ranks
from tiny_runs import train_rank
from tiny_texts import NUM_LABELS, text_config, write_texts

from data.errors import DataError
from data.index import build_index
from data.label_lists import index_label_lists
from data.label_table import LabelTable, read_label_table, write_label_table
from data.rows import Keys
from data.shards import expand_shards
from data.text import build_tokenizer
from launch.runs import evaluate_rank
from trainer.config import Config, ConfigError, HnswConfig, parse_config
from trainer.evaluate.xmc_hnsw import approximate_labels, recall_of
from trainer.evaluate.xmc_metrics import NO_LABEL
from trainer.evaluate.xmc_search import Pairs, top_labels
from trainer.objectives import build_model
from trainer.ranks import Ranks
from trainer.validate import build_validation, check_sets

KS = (1, 3, 5)


def label_config(folder: Path, **sections: dict) -> Config:
    """The tiny texts, evaluated on texts of their own."""
    val = folder / "val"
    if not val.exists():
        write_texts(val, num_texts=41, seed=7)
        (val / "labels.parquet").unlink()
    shards = {"val_shards": str(val / "t-{0..2}.tar")}
    sections["data"] = {**shards, **sections.get("data", {})}
    sections["eval"] = {"batch_size": 7, **sections.get("eval", {})}
    return text_config(folder, **sections)


@pytest.fixture
def evaluate_run(monkeypatch):
    """`evaluate_rank`, which makes this process a rank, and the environment as it was."""

    def evaluate(run: Path, *overrides: str) -> dict[str, float | str]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        numbers = evaluate_rank(run, list(overrides))
        assert numbers is not None
        return numbers

    return evaluate


def ranks_of(group) -> Ranks:
    return Ranks() if group is None else Ranks(group, group.rank(), group.size())


def evaluated(group, config: Config) -> dict[str, float]:
    model = build_model(config)
    return build_validation(config, model, ranks_of(group))(model)


def read_predictions(path) -> dict[str, tuple[list[int], list[float]]]:
    table = pq.read_table(path).to_pydict()
    rows = zip(table["labels"], table["scores"], strict=True)
    return dict(zip(table["key"], rows, strict=True))


def embedded(config: Config) -> tuple[list[str], list[list[int]], torch.Tensor, torch.Tensor]:
    """Keys, labels and rows of the queries, and the labels' rows, one text at a time."""
    model = build_model(config).eval()
    tokenizer = build_tokenizer(model.tokenizer_spec)
    names = expand_shards(config.data.val_shards)
    keys = Keys("", "txt", "cls")
    index = build_index(names, required=["txt", "labels"], keys=keys)
    lists = index_label_lists(index)
    entries = index.entries(range(len(index)))
    texts = []
    for entry in entries:
        part = entry.part("txt")
        shard = Path(entry.shard).read_bytes()
        texts.append(shard[part.offset : part.offset + part.size].decode())
    table = read_label_table(Path(config.data.shards).parent / "labels.parquet")
    with torch.no_grad():
        queries = torch.cat([model(tokenizer([text])).queries for text in texts])
        labels = torch.cat([model(None, tokenizer([text])).labels for text in table.texts_of()])
    return [e.key for e in entries], [lists.row(i) for i in range(len(index))], queries, labels


def votes_of_loops(
    queries: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, of_texts: list, options
) -> torch.Tensor:
    """(n, L) float64 scores with votes, one query and one text at a time."""
    scores = torch.zeros(len(queries), len(labels), dtype=torch.float64)
    mean = sum(map(len, of_texts)) / len(of_texts)
    for row, query in enumerate(queries.double()):
        own = (labels.double() @ query / options.temperature).softmax(0)
        scores[row] += (1 - options.weight) * mean * own
        cosines = texts.double() @ query
        nearest = cosines.float().sort(descending=True, stable=True).indices[: options.count]
        shares = (cosines[nearest].float().double() / options.temperature).softmax(0)
        for share, text in zip(shares.tolist(), nearest.tolist(), strict=True):
            for label in of_texts[text]:
                scores[row, label] += options.weight * share
    return scores


@pytest.mark.parametrize("count", [1, 7, 500])
def test_votes_of_nearest_texts_equal_loops(tmp_path, count):
    votes = {"count": count, "weight": 0.6, "temperature": 0.1}
    predictions = tmp_path / "p.parquet"
    config = label_config(
        tmp_path, eval={"neighbours": votes, "predictions": str(predictions)}, labels={"top": 23}
    )
    assert evaluated(None, config)["num_xmc_neighbours"] == count
    trained = parse_config(
        {
            **config.model_dump(),
            "data": {**config.data.model_dump(), "val_shards": config.data.shards},
        },
        "x",
    )
    _, of_texts, texts, labels = embedded(trained)
    keys, _, queries, _ = embedded(config)
    wanted = votes_of_loops(queries, labels, texts, of_texts, config.eval.neighbours)
    found = read_predictions(predictions)
    for row, key in enumerate(keys):
        ranked, scores = found[key]
        assert scores == pytest.approx(wanted[row].sort(descending=True).values.tolist(), abs=1e-6)
        assert wanted[row][ranked].tolist() == pytest.approx(scores, abs=1e-6)
    for world_size in (2, 3):
        run_ranks(world_size, evaluated, config)
        again = read_predictions(predictions)
        assert again.keys() == found.keys()
        for key, (_, scores) in again.items():  # towers round by the shape of a batch
            assert scores == pytest.approx(found[key][1], abs=1e-6)


def test_votes_need_training_texts(tmp_path):
    table = label_config(tmp_path).data.shards.replace("t-{0..2}.tar", "labels.parquet")
    config = label_config(
        tmp_path,
        eval={"neighbours": {"count": 3}},
        data={"shards": ""},
        labels={"table": table},
    )
    with pytest.raises(ConfigError, match=r"count = 3: training texts vote.*--data.shards="):
        evaluated(None, config)


def test_figures_of_a_model_equal_loops(tmp_path):
    config = label_config(tmp_path, eval={"predictions": str(tmp_path / "p.parquet")})
    numbers = evaluated(None, config)
    keys, wanted, queries, labels = embedded(config)
    ranked = xmc_oracles.ranking(queries, labels, torch.arange(NUM_LABELS))
    table = read_label_table(tmp_path / "texts" / "labels.parquet")
    q = [
        xmc_oracles.inverse_propensity(count, 90, 0.55, 1.5) for count in table.train_count.tolist()
    ]
    for k in KS:
        expected = xmc_oracles.metrics(ranked, wanted, q, k, NUM_LABELS)
        for name, value in expected.items():
            assert numbers[name] == pytest.approx(value, rel=1e-9), name
    assert numbers["num_xmc_queries"] == sum(map(bool, wanted)) < numbers["num_texts"] == 41
    assert numbers["xmc_R@100"] == 1 and numbers["num_xmc_points"] == 90
    assert (numbers["xmc_propensity_A"], numbers["xmc_propensity_B"]) == (0.55, 1.5)
    predictions = read_predictions(tmp_path / "p.parquet")
    assert list(predictions) == keys
    assert [predictions[key][0] for key in keys] == ranked
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


def test_figures_and_file_are_the_same_at_any_world_size(tmp_path):
    config = label_config(tmp_path, eval={"predictions": str(tmp_path / "p.parquet")})
    whole = evaluated(None, config)
    predictions = read_predictions(tmp_path / "p.parquet")
    for world_size in (2, 3):
        (tmp_path / "p.parquet").unlink()
        for numbers in run_ranks(world_size, evaluated, config):
            assert numbers == whole
        again = read_predictions(tmp_path / "p.parquet")
        assert list(again) == list(predictions)
        for key, (labels, scores) in predictions.items():
            assert again[key][0] == labels
            assert again[key][1] == pytest.approx(scores, abs=1e-6)


def test_filtered_pairs_go_and_only_they(tmp_path):
    config = label_config(tmp_path, eval={"predictions": str(tmp_path / "p.parquet")})
    evaluated(None, config)
    before = read_predictions(tmp_path / "p.parquet")
    gone = {"0000": before["0000"][0][:2], "0011": before["0011"][0][4:5]}
    lines = [f"{key} {label}\n" for key, labels in gone.items() for label in labels]
    (tmp_path / "val" / "filter_labels_test.txt").write_text("".join(lines))
    for index in ("exact", "hnsw"):
        config = label_config(
            tmp_path, eval={"predictions": str(tmp_path / "p.parquet"), "index": index}
        )
        assert evaluated(None, config)["num_xmc_filtered"] == 3
        after = read_predictions(tmp_path / "p.parquet")
        for key, (labels, _) in before.items():
            assert after[key][0] == [label for label in labels if label not in gone.get(key, [])]


@pytest.mark.parametrize("rows", ["texts", "classifiers"])
def test_a_run_is_evaluated_while_it_trains_and_after(tmp_path, evaluate_run, rows):
    config = label_config(
        tmp_path,
        labels={"rows": rows, "over": "all"},
        train={"duration": "8 steps"},
        checkpoint={"every": "8 steps"},
        eval={"every": "4 steps"},
    )
    run_ranks(2, train_rank, config, str(tmp_path / "run"))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    found = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    assert sorted(found) == [4, 8]
    assert all(0 <= found[step]["xmc_P@1"] <= 1 for step in found)
    after = evaluate_run(tmp_path / "run")
    assert str(after.pop("checkpoint")).endswith("step-00000008")
    assert after == found[8]
    fewer = evaluate_run(tmp_path / "run", "--labels.top=3")
    assert "xmc_R@5" not in fewer
    assert fewer["xmc_P@3"] == found[8]["xmc_P@3"]


def test_a_table_without_counts_has_no_propensities(tmp_path):
    config = label_config(tmp_path)
    path = tmp_path / "texts" / "labels.parquet"
    table = read_label_table(path)
    write_label_table(path, LabelTable(table.texts, table.train_count * 0, 0))
    numbers = evaluated(None, config)
    assert not [name for name in numbers if "PS" in name or "propensity" in name]
    assert "xmc_P@1" in numbers and "xmc_nDCG@5" in numbers


def test_without_the_training_shards_the_table_lies_beside_those_evaluated(tmp_path):
    config = label_config(tmp_path)
    expected = evaluated(None, config)
    (tmp_path / "texts" / "labels.parquet").rename(tmp_path / "val" / "labels.parquet")
    for shard in (tmp_path / "texts").iterdir():
        shard.unlink()
    assert evaluated(None, config) == expected


# ---------------------------------------------------------------- approximate search


def unit_rows(count, dim, seed):
    made = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=1)


def _approximate(group, queries, labels, left_out, bounds):
    rank = group.rank()
    first, last = (round(share * len(queries)) for share in bounds[rank : rank + 2])
    start, stop = (round((1 - share) * len(labels)) for share in bounds[rank : rank + 2][::-1])
    here = (left_out.rows >= first) & (left_out.rows < last)
    found = approximate_labels(
        queries[first:last],
        labels[start:stop],
        torch.arange(len(labels))[start:stop],
        6,
        group,
        HnswConfig(m=16, ef_construction=100, ef_search=300),
        left_out=Pairs(left_out.rows[here] - first, left_out.labels[here]),
    )
    return found.scores, found.labels


@pytest.mark.parametrize("bounds", DEALS)
def test_graphs_that_look_at_every_label_are_exact(bounds):
    queries, labels = unit_rows(40, 6, 0), unit_rows(250, 6, 1)
    queries[3], labels[17] = torch.nan, torch.inf
    left_out = Pairs(torch.arange(0, 40, 2), torch.arange(0, 40, 2) * 5)
    scores, found = top_labels(queries, labels, torch.arange(250), 6, None, left_out=left_out)
    parts = run_ranks(len(bounds) - 1, _approximate, queries, labels, left_out, bounds)
    assert torch.equal(torch.cat([part[1] for part in parts]), found)
    assert torch.equal(torch.cat([part[0] for part in parts]), scores)
    assert (found[3] == NO_LABEL).all()


def test_recall_counts_what_there_is():
    exact = torch.tensor([[4, 2, 7], [1, 5, NO_LABEL]])
    found = torch.tensor([[2, 4, 9], [5, 3, 1]])
    assert recall_of(found, exact, (1, 2, 3), None) == {1: 0, 2: 3 / 4, 3: 4 / 5}


def _hnsw_numbers(group, config):
    return evaluated(group, config)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_recall_of_a_graph_stands_beside_its_figures(tmp_path, world_size):
    exact = evaluated(None, label_config(tmp_path))
    config = label_config(tmp_path, eval={"index": "hnsw", "hnsw": {"sample": 10}})
    for numbers in run_ranks(world_size, _hnsw_numbers, config):
        assert 8 <= numbers["num_xmc_sample"] <= 10
        assert numbers["xmc_hnsw_recall@1"] == numbers["xmc_hnsw_recall@100"] == 1
        assert min(numbers[f"xmc_{name}_s"] for name in ("hnsw_build", "hnsw_search")) > 0
        assert {name: numbers[name] for name in exact} == exact


def test_no_faiss_is_one_clear_error(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        evaluated(None, label_config(tmp_path, eval={"index": "hnsw"}))


# ---------------------------------------------------------------- bad input


def test_tasks_and_runs_that_do_not_fit_are_errors(tmp_path):
    config = label_config(tmp_path, eval={"tasks": ["xmc", "retrieval"]})
    with pytest.raises(ConfigError, match="retrieval is not for texts against labels"):
        check_sets(config, config.data.val_shards)
    clip = parse_config({"eval": {"tasks": ["xmc"]}}, "clip")
    with pytest.raises(ConfigError, match="xmc is about texts with labels"):
        check_sets(clip, config.data.val_shards)


def test_a_place_for_predictions_that_is_none_is_an_error(tmp_path):
    for path, problem in ((tmp_path / "no" / "p.parquet", "no folder"), (tmp_path, "is a folder")):
        config = label_config(tmp_path, eval={"predictions": str(path)})
        with pytest.raises(ConfigError, match=problem):
            check_sets(config, config.data.val_shards)


def test_a_label_without_a_text_and_another_sets_filter_are_errors(tmp_path):
    config = label_config(tmp_path)
    path = tmp_path / "texts" / "labels.parquet"
    table = read_label_table(path)
    (tmp_path / "val" / "filter_labels_test.txt").write_text("elsewhere 3\n")
    with pytest.raises(DataError, match="a list speaks of one split of one data set"):
        check_sets(config, config.data.val_shards)
    write_label_table(path, LabelTable(table.texts[:5], table.train_count[:5], 90))
    with pytest.raises(DataError, match="has no text"):
        check_sets(config, config.data.val_shards)


def test_classifiers_of_other_labels_are_an_error(tmp_path, evaluate_run):
    config = label_config(
        tmp_path,
        labels={"rows": "classifiers"},
        train={"duration": "1 steps"},
        eval={"every": "1 steps"},
    )
    run_ranks(1, train_rank, config, str(tmp_path / "run"))
    path = tmp_path / "texts" / "labels.parquet"
    table = read_label_table(path)
    more = [*table.texts_of(), "one more"]
    counts = np.append(table.train_count, 1)
    write_label_table(path, LabelTable(pa.array(more, pa.large_string()), counts, 90))
    with pytest.raises(ConfigError, match=f"{NUM_LABELS} labels.*labels.table"):
        evaluate_run(tmp_path / "run")
