"""The small real sets run through the whole trainer without a special case."""

import json

import pytest
from ranks import run_ranks
from tiny_runs import tiny_config, train_rank

SETS = {
    "emoji-pairs": ("txt", ["retrieval", "zero_shot"]),
    "caltech101-names": ("txt", ["zero_shot"]),
    "coco-cc-captions": ("json:captions", ["retrieval"]),
    "tuxpaint-stamps": ("txt", ["retrieval"]),
}


@pytest.mark.parametrize("name", SETS)
def test_a_real_set_trains_and_evaluates(tmp_path, real_dataset, monkeypatch, name):
    folder = real_dataset(name)
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path / "cache"))
    caption_key, tasks = SETS[name]
    config = tiny_config(
        tmp_path,
        data={
            "shards": str(folder / "train-*.tar"),
            "val_shards": str(folder / "val-*.tar"),
            "caption_key": caption_key,
        },
        train={"duration": "2 steps"},
        eval={"tasks": tasks},
    )
    assert run_ranks(2, train_rank, config, str(tmp_path / "r")) == [True, True]
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    results = next(line["evaluation"] for line in lines if "evaluation" in line)
    assert results["num_images"] > 40 and results["num_bad"] == 0
    assert any(key.endswith(("top1", "R@1")) for key in results)
    assert lines[0]["bad_samples"] == 0
