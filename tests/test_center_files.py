"""Centers in checkpoints: stored by some ranks, loaded by others, as if nothing had happened."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from trainer.centers import ClassCenters
from trainer.centers.files import StoredCenters, load_state, state_files
from trainer.centers.identities import NameTable
from trainer.checkpoint import TrainState, find_newest
from trainer.config import Config, ConfigError, dump_config, parse_config
from trainer.ranks import Ranks
from trainer.saving import CheckpointFolder

C, D, N, STEPS = 11, 6, 13, 3
CASES = {
    "sgd": {},
    "sgd exact": {"mode": "exact", "sample_rate": 0.5, "subcenters": 2},
    "decay exact": {"mode": "exact", "momentum": 0.0, "sample_rate": 0.3},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "subcenters": 2},
    "adamw exact": {"optimizer": "adamw", "mode": "exact", "sample_rate": 0.5},
    "adagrad": {"optimizer": "adagrad", "sample_rate": 0.5},
    "adagrad exact": {"optimizer": "adagrad", "mode": "exact", "sample_rate": 0.5},
    "hard": {"sample_rate": 0.7, "hard_share": 0.5, "hard_neighbours": 3, "hard_every": 2},
    "adaface": {"loss": "adaface", "subcenters": 2},
    "curricularface": {"loss": "curricularface", "momentum": 0.0, "subcenters": 3},
    "bf16": {"dtype": "bfloat16", "momentum_dtype": "bfloat16", "sample_rate": 0.5},
    "bf16 exact": {"dtype": "bfloat16", "mode": "exact", "sample_rate": 0.5},
    "bf16 adamw": {"dtype": "bfloat16", "optimizer": "adamw", "momentum_dtype": "bfloat16"},
}


def case_config(options: dict) -> Config:
    options = {"init_std": 0.7, "mode": "lazy", **options}
    loss = {"name": options.pop("loss", "arcface"), "scale": 9.0}
    return parse_config({"loss": loss, "centers": options, "train": {"seed": 5}}, "case")


def build(group, config: Config, *, draw: bool, num_classes: int = C, dim: int = D):
    return ClassCenters(
        num_classes,
        dim,
        group,
        loss=config.loss,
        config=config.centers,
        seed=config.train.seed,
        dtype=torch.float32 if config.centers.dtype == "bfloat16" else torch.float64,
        draw=draw,
    )


def own_rows(group) -> slice:
    """Ragged: the last rank has most, and with four ranks the first has none."""
    cuts = {1: [0, N], 2: [0, 4, N], 3: [0, 1, 5, N], 4: [0, 0, 3, 8, N]}[group.size()]
    return slice(cuts[group.rank()], cuts[group.rank() + 1])


def train(centers: ClassCenters, group, steps: range) -> list[float]:
    """Losses of these steps; the learning rate changes from step to step."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(N, centers.dim, generator=generator, dtype=torch.float64) * 5
        labels = torch.randint(0, centers.num_classes, (N,), generator=generator)
        own = own_rows(group)
        mine = rows[own].to(centers.dtype).requires_grad_()
        loss = centers(mine, labels[own], torch.arange(N)[own], step)
        loss.backward()
        losses.append(loss.item())
        centers.step(0.4 / (step + 1))
    return losses


def tables_of(centers: ClassCenters) -> dict[str, torch.Tensor]:
    """Everything that this rank knows of its rows."""
    tables = {name: table.clone() for name, table in centers.optimizer.tables().items()}
    if centers.neighbours is not None:
        tables["neighbours"] = centers.neighbours.lists.clone()
    return tables


def save(centers: ClassCenters, group, folder: Path, config: Config, names=None) -> None:
    ranks = Ranks(group, group.rank(), group.size())
    state = TrainState("", group.size(), 0, step=centers.steps)
    saver = CheckpointFolder(folder, ranks, keep_last=9)
    saver.save(state, dump_config(config), state_files(centers, names))


def storing_rank(group, folder: Path) -> dict:
    """Each case trained, saved, and trained on without a stop."""
    told = {}
    for case, options in CASES.items():
        config = case_config(options)
        centers = build(group, config, draw=True)
        train(centers, group, range(STEPS))
        save(centers, group, folder / str(group.size()) / case, config)
        stored = tables_of(centers)
        margin = centers.margin.state()
        losses = train(centers, group, range(STEPS, 2 * STEPS))
        told[case] = (stored, margin, losses, tables_of(centers))
    return told


def loading_rank(group, folder: Path) -> dict:
    """Each case of each number of ranks, loaded and trained on."""
    told = {}
    for stored_by, (case, options) in itertools.product((1, 2, 3), CASES.items()):
        centers = build(group, case_config(options), draw=False)
        load_state(centers, find_newest(folder / str(stored_by) / case))
        assert centers.steps == STEPS
        loaded = tables_of(centers)
        margin = centers.margin.state()
        losses = train(centers, group, range(STEPS, 2 * STEPS))
        told[stored_by, case] = (loaded, margin, losses, tables_of(centers))
    return told


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with every case as saved by 1, 2 and 3 ranks, and what the ranks told of it."""
    folder = tmp_path_factory.mktemp("stored")
    return folder, {
        world_size: run_ranks(world_size, storing_rank, folder) for world_size in (1, 2, 3)
    }


def joined(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}


def prefix(place: str):
    return lambda text: f"{place}: {text}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_loaded_by_any_number_of_ranks_it_goes_on_as_if_never_stopped(stored, world_size):
    folder, stored_by = stored
    found = run_ranks(world_size, loading_rank, folder)
    for (stored_ranks, case), first in found[0].items():
        before = stored_by[stored_ranks]
        same = stored_ranks == world_size
        here = f"{case}: {stored_ranks} -> {world_size}"
        expected = joined([rank[case][0] for rank in before])
        loaded = joined([rank[stored_ranks, case][0] for rank in found])
        assert expected.keys() == loaded.keys()
        for name, table in expected.items():
            assert torch.equal(loaded[name], table), f"{here}: {name}"
        assert first[1] == before[0][case][1], here
        if same:
            assert [rank[stored_ranks, case][2] for rank in found] == [
                rank[case][2] for rank in before
            ], here
        expected = joined([rank[case][3] for rank in before])
        ended = joined([rank[stored_ranks, case][3] for rank in found])
        half = "bf16" in case
        # Float32 sums differ in their last bits with the ranks, and one is rounded up, one down.
        close = {"rtol": 0.05, "atol": 0.02} if half else {"rtol": 1e-10, "atol": 1e-10}
        for name, table in expected.items():
            if same:
                assert torch.equal(ended[name], table), f"{here}: {name}"
            else:
                torch.testing.assert_close(
                    ended[name], table, **close, msg=prefix(f"{here}: {name}")
                )
        global_loss = [np.mean([rank[case][2] for rank in before], axis=0)]
        ours = [np.mean([rank[stored_ranks, case][2] for rank in found], axis=0)]
        np.testing.assert_allclose(ours, global_loss, rtol=1e-3 if half else 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_centers_are_read_as_they_are_at_their_step(stored, case):
    """What untouched rows missed is there, for readers of any range of any rank's rows."""
    folder, _ = stored
    config = case_config(CASES[case])
    sub = config.centers.subcenters
    for stored_by in (1, 3):
        checkpoint = find_newest(folder / str(stored_by) / case)
        centers = build(None, config, draw=False)
        load_state(centers, checkpoint)
        behind = centers.optimizer.tables()["rows"].clone()
        centers.optimizer.finish()
        expected = centers.optimizer.tables()["rows"]
        assert torch.equal(behind, expected) == ("exact" not in case)
        source = StoredCenters.open(checkpoint)
        rows = torch.cat([block for _, block in source.present()])
        assert rows.dtype == source.dtype == expected.dtype
        assert torch.equal(rows, expected)
        wanted = np.array([2, 3, 7])
        for first, block in source.present(wanted):
            assert torch.equal(block, expected[first * sub :][: len(block)])
            assert first == 2 and len(block) == (7 - 2 + 1) * sub


def test_centers_are_read_in_blocks(stored, monkeypatch):
    folder, _ = stored
    for stored_by, case in itertools.product((1, 2, 3), ("sgd exact", "hard")):
        source = StoredCenters.open(find_newest(folder / str(stored_by) / case))
        monkeypatch.undo()
        whole = torch.cat([block for _, block in source.present()])
        monkeypatch.setattr("trainer.centers.files._READ_BYTES", 500)
        blocks = list(source.present())
        assert len(blocks) > 2
        assert torch.equal(torch.cat([block for _, block in blocks]), whole)
        few = list(source.present(np.array([1, 9])))
        assert [first for first, _ in few] == [1, 9]
        assert torch.equal(few[1][1], whole[9 * source.subcenters : 10 * source.subcenters])


WRONG = [
    ({"num_classes": C + 1}, {}, "set centers.num_classes = 11 (this run: 12)"),
    ({"dim": D + 1}, {}, "set model.embedding_dim = 6 (this run: 7)"),
    ({}, {"subcenters": 3}, "set centers.subcenters = 2 (this run: 3)"),
    ({"num_classes": 9, "dim": 3}, {}, "num_classes = 11 (this run: 9), model.embedding_dim = 6"),
    ({}, {"mode": "lazy"}, "set centers.optimizer, mode"),
    ({}, {"optimizer": "adamw"}, "set centers.optimizer, mode"),
    ({}, {"momentum": 0.0}, "set centers.optimizer, mode"),
]


@pytest.mark.parametrize(("shape", "options", "said"), WRONG)
def test_what_does_not_fit_is_one_error_that_names_the_setting(stored, shape, options, said):
    folder, _ = stored
    checkpoint = find_newest(folder / "2" / "sgd exact")
    config = case_config({**CASES["sgd exact"], **options})
    with pytest.raises(ConfigError) as error:
        load_state(build(None, config, draw=False, **shape), checkpoint)
    assert said in str(error.value) and str(checkpoint) in str(error.value)


def test_lists_of_another_length_are_named(stored):
    folder, _ = stored
    config = case_config({**CASES["hard"], "hard_neighbours": 5})
    with pytest.raises(ConfigError, match=r"set centers.hard_neighbours = 3 \(this run: 5\)"):
        load_state(build(None, config, draw=False), find_newest(folder / "1" / "hard"))


def test_a_folder_without_centers_and_another_format_are_named(tmp_path, stored):
    with pytest.raises(ConfigError, match="holds no class centers"):
        StoredCenters.open(tmp_path)
    (tmp_path / "centers").mkdir()
    (tmp_path / "centers" / "layout.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigError, match="format 99, this version reads 1"):
        StoredCenters.open(tmp_path)


def damaged_rank(group, folder: Path) -> None:
    config = case_config({})
    centers = build(group, config, draw=True)
    names = NameTable.of([f"person {i}" for i in range(C)])
    for _ in range(5):
        train(centers, group, range(centers.steps, centers.steps + 1))
        save(centers, group, folder, config, names)


def test_a_checkpoint_with_a_damaged_part_is_passed_over(tmp_path):
    """Truncated, missing, changed or not finished: the newest whole one is taken."""
    run_ranks(2, damaged_rank, tmp_path)
    part = "centers/part-00001.safetensors"
    newest = [tmp_path / f"step-{step:08d}" for step in (5, 4, 3, 2, 1)]
    assert find_newest(tmp_path) == newest[0]
    (newest[0] / part).write_bytes((newest[0] / part).read_bytes()[:-1])
    assert find_newest(tmp_path) == newest[1]
    (newest[1] / part).unlink()
    assert find_newest(tmp_path) == newest[2]
    names = newest[2] / "centers" / "identities.arrow"
    names.write_bytes(names.read_bytes().replace(b"person 3", b"person 4"))
    assert find_newest(tmp_path) == newest[3]
    (newest[3] / "centers" / "history.safetensors").write_bytes(b"")
    assert find_newest(tmp_path) == newest[4]
    source = StoredCenters.open(newest[4])
    assert source.names().names.to_pylist() == [f"person {i}" for i in range(C)]
    assert source.steps == 1
