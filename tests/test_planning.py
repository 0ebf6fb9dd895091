"""Planning while training: whole small runs, killed and resumed, on one rank and on more."""

import fcntl
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from tiny_faces import face_config
from tiny_runs import read_losses, read_samples, tiny_config, train_rank
from tiny_texts import text_config

from data.errors import DataError
from data.label_lists import load_label_lists
from data.negatives.plan import BatchPlan, load_header
from data.negatives.store import EmbeddingStore
from data.planned_order import Segment
from trainer.config import ConfigError
from trainer.durable import write_file
from trainer.planning.background import Job
from trainer.planning.prune import first_needed
from trainer.planning.report import describe_plans, load_plans
from trainer.planning.rows import Projection, Side, gather_by_id
from trainer.planning.stored import restore_store, store_files
from trainer.ranks import Ranks
from trainer.samples import build_samples

STEPS, SAMPLES, BATCH = 14, 60, 16
# Epochs end inside the batches of steps 4, 8 and 12; plans begin there and at steps 7 and 11.
NEGATIVES = {"refresh": "2 steps", "lead": "1 steps", "refresh_pass": True, "cluster_size": 4}
SECTIONS = {
    "data": {"batching": "planned"},
    "train": {"duration": f"{STEPS} steps"},
    "checkpoint": {"every": "3 steps", "keep_last": 99},
    "eval": {"batch_size": 8},
}


def planned_config(folder: Path, negatives: dict, make=tiny_config, **sections: dict):
    """60 samples, 16 a batch."""
    names = {*SECTIONS, *sections}
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in names}
    return make(folder, negatives=negatives, **merged)


def planned_rank(group, config, run: str, fault: str = "") -> bool:
    """Train as one rank. fault: "step 5", "plan 1", "save 1", "refresh 1", "prune 1": dies there;
    "slow" takes its time for each plan.
    """
    from trainer.hardness import controller
    from trainer.planning import maker, refresh

    controller.MIN_ROWS = BATCH  # rows of one step are enough
    kind, _, number = fault.partition(" ")
    calls = 0

    def die(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == int(number) + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind in ("plan", "slow"):
        make_plan = maker.make_plan

        def make(*arguments, **options):
            time.sleep(0.5)
            if kind == "plan":
                die()
            return make_plan(*arguments, **options)

        maker.make_plan = make
    if kind == "save":  # all is written, nothing has its name yet
        from data.negatives import files

        flush = files.flush_folder
        files.flush_folder = lambda path: die() if ".draft" in path.name else flush(path)
    if kind == "prune":  # amid the removal of a plan
        from trainer.planning import prune

        remove = prune.remove
        prune.remove = lambda path: die() if path.exists() else remove(path)
    if kind == "refresh":
        gather = refresh.gather_by_id
        refresh.gather_by_id = lambda *arguments: (die(), gather(*arguments))[1]
    return train_rank(group, config, run, int(number) if kind == "step" else 0)


def check_epochs(run: Path, num_samples: int = SAMPLES, batch: int = BATCH) -> None:
    """Every epoch holds each sample once, no batch one twice."""
    samples = read_samples(run)
    keys = [key for step in sorted(samples) for key in samples[step]]
    for start in range(0, len(keys) - num_samples + 1, num_samples):
        assert len(set(keys[start : start + num_samples])) == num_samples
    assert all(len(set(one)) == batch for one in samples.values())


def wait_for_workers(run: Path) -> None:
    """Until those of a killed rank have seen that it is gone: they hold the run's lock with it."""
    with (run / ".lock").open() as lock:
        for _ in range(200):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.1)


def read_lines(run: Path) -> dict[int, dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def segments_of(run: Path) -> list[list]:
    newest = max((run / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text())["planning"]["segments"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks that was never stopped."""
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "whole"
    run_ranks(2, planned_rank, planned_config(folder, NEGATIVES), str(run))
    return run


def test_plans_begin_where_they_are_meant_to(whole):
    check_epochs(whole)
    table = segments_of(whole)
    assert [(start, stop) for start, stop, *_ in table] == [
        (0, 60), (60, 96), (96, 120), (120, 160), (160, 180), (180, 240)
    ]  # fmt: skip
    assert [plan for _, _, plan, *_ in table] == ["", *(f"plan-{n:06d}" for n in range(5))]
    headers = [load_header(whole / "plans" / plan) for _, _, plan, *_ in table[1:]]
    assert [header.asked_step for header in headers] == [2, 5, 6, 9, 10]
    assert [header.num_samples for header in headers] == [60, 24, 60, 20, 60]
    assert [header.num_unseen for header in headers] == [0] * 5
    assert all(header.num_clusters > 0 for header in headers)


def test_the_numbers_of_planning_are_in_the_metrics(whole):
    lines = read_lines(whole)
    assert lines[3]["plan_version"] == -1 and "plan_age" not in lines[3]
    assert lines[2]["store_fill"] == 1.0 and lines[2]["refresh_s"] > 0
    assert [lines[step]["plan_version"] for step in (4, 6, 7, 8, 12)] == [0, 0, 1, 2, 4]
    assert lines[6]["plan_age"] == 4 and lines[6]["plan_lag"] == 1
    assert 0 <= lines[14]["store_age_p50"] <= lines[14]["store_age_p90"] <= 14
    assert 0 < lines[14]["store_drift"] < 1 and lines[14]["plan_wait_s"] >= 0
    assert any("plan_make_s" in line for line in lines.values())


@pytest.mark.parametrize(
    ("fault", "then"), [("plan 2", 2), ("save 3", 1), ("refresh 13", 2), ("step 8", 1)]
)
def test_a_killed_run_has_the_same_batches(whole, tmp_path, fault, then):
    config = planned_config(whole.parent, NEGATIVES)
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"exit code|rror"):
        run_ranks(2, planned_rank, config, str(run), fault)
    assert max(read_losses(run)) < STEPS
    made = {path.name for path in (run / "plans").glob("plan-*")}
    assert run_ranks(then, planned_rank, config, str(run)) == [True] * then
    check_epochs(run)
    expected, found = read_samples(whole), read_samples(run)
    if then == 2:
        assert found == expected
        assert read_losses(run) == read_losses(whole)
        return
    known = max(stop for _, stop, plan, *_ in segments_of(run) if plan in made | {""})
    assert known // BATCH > 3
    for step in range(1, known // BATCH + 1):  # later plans follow from rounded embeddings
        assert found[step] == expected[step], f"step {step}"


def test_without_a_refresh_pass_the_store_is_what_training_wrote(tmp_path):
    config = planned_config(tmp_path, {"refresh": "1 epochs"}, checkpoint={"every": "4 steps"})
    run = tmp_path / "run"
    run_ranks(2, planned_rank, config, str(run))
    check_epochs(run)
    headers = [load_header(path) for path in sorted((run / "plans").iterdir())]
    assert [header.asked_step for header in headers] == [2, 6, 10]
    assert headers[0].num_unseen == SAMPLES - 2 * BATCH and headers[1].num_unseen == 0
    store = EmbeddingStore.open(run / "store")
    newest = max((run / "checkpoints").glob("step-*"))
    again = EmbeddingStore.create(tmp_path / "again", SAMPLES, 16, fingerprint=store.fingerprint)
    restore_store(again, newest)
    assert np.array_equal(again.read(slice(None)), store.read(slice(None)))
    assert np.array_equal(again.steps, store.steps) and again.steps.max() == STEPS
    # A run that is killed before the first plan begins goes on with the same store.
    with pytest.raises(AssertionError):
        run_ranks(2, planned_rank, config, str(tmp_path / "killed"), "step 5")
    shutil.rmtree(tmp_path / "killed" / "plans")  # all plans but those the checkpoint names
    shutil.copytree(run / "plans" / "plan-000000", tmp_path / "killed" / "plans" / "plan-000000")
    run_ranks(2, planned_rank, config, str(tmp_path / "killed"))
    assert read_samples(tmp_path / "killed") == read_samples(run)


def test_an_epoch_between_two_plans_shuffles_the_clusters(tmp_path):
    negatives = {"refresh": "2 epochs", "start_epoch": 0, "cluster_size": 2}
    run = tmp_path / "run"
    config = planned_config(tmp_path, negatives, train={"duration": "12 steps"})
    run_ranks(1, planned_rank, config, str(run))
    check_epochs(run)
    plans = [BatchPlan.load(run / "plans" / f"plan-{n:06d}") for n in range(4)]
    assert plans[0].header.num_unseen == 0  # the first batch is planned: a pass came before it
    clusters = [
        {frozenset(part.tolist()) for part in np.split(plan.order, plan.bounds[1:-1])}
        for plan in plans
    ]
    assert len(clusters[0] & clusters[1]) > 20 > len(clusters[0] & clusters[2])
    assert not np.array_equal(plans[0].order, plans[1].order)
    lines = read_lines(run)
    assert lines[11]["plan_version"] == 2 and lines[11]["plan_lag"] == 1
    assert lines[12]["plan_version"] == 3 and lines[12]["plan_age"] == 6  # of the embeddings


def test_a_late_plan_is_not_waited_for_if_not_strict(tmp_path):
    negatives = {"refresh": "3 steps", "lead": "1 steps", "strict": False, "start_epoch": 1}
    sections = {"train": {"duration": "40 steps"}, "checkpoint": {"every": "20 steps"}}
    config = planned_config(tmp_path, negatives, **sections)
    run = tmp_path / "run"
    run_ranks(2, planned_rank, config, str(run), "slow")
    check_epochs(run)
    table = segments_of(run)
    plans = [row[2] for row in table]
    assert "" in plans[1:] or any(a == b for a, b in itertools.pairwise(plans))
    assert any("-from-" in plan for plan in plans), plans
    starts = [row[0] for row in table]
    assert all(start % BATCH == 0 or start % SAMPLES == 0 for start in starts)
    again = tmp_path / "again"  # the checkpoint replays its decisions, whenever plans come
    shutil.copytree(run, again)
    shutil.rmtree(max((again / "checkpoints").glob("step-*")))
    run_ranks(1, planned_rank, config, str(again))
    check_epochs(again)
    known = json.loads((again / "checkpoints/step-00000020/state.json").read_text())["planning"][
        "segments"
    ]
    assert segments_of(again)[: len(known)] == known
    expected, found = read_samples(run), read_samples(again)
    for step in range(1, known[-1][1] // BATCH + 1):
        assert found[step] == expected[step]


def test_faces_by_near_identities(tmp_path):
    negatives = {"planner": "identities", "start_epoch": 1}
    config = planned_config(tmp_path, negatives, face_config)
    run_ranks(2, planned_rank, config, str(tmp_path / "run"))
    check_epochs(tmp_path / "run", 66)
    labels = np.array([key[5:].split(":")[1][:3] for key in read_samples(tmp_path / "run")[6]])
    assert len(set(labels)) <= 6  # four images of an identity, where it has them


def test_texts_with_labels_in_parts_of_parameters(tmp_path):
    negatives = {"refresh": "4 steps", "refresh_pass": True, "random_share": 0.25}
    negatives["unique"] = ["label"]
    sections = {"zero": {"stage": 3}, "labels": {"over": "batch"}}
    config = planned_config(tmp_path, negatives, text_config, **sections)
    run_ranks(2, planned_rank, config, str(tmp_path / "run"))
    check_epochs(tmp_path / "run", 90)
    (plan,) = [BatchPlan.load(path) for path in (tmp_path / "run" / "plans").iterdir()][:1]
    assert plan.header.num_unseen == 0 and plan.header.num_clusters > 0
    lists = load_label_lists(build_samples(config).indexes)
    edges, shared = plan.edges(), 0
    for start, stop in itertools.pairwise(edges.tolist()):
        seen: set[int] = set()
        for sample in plan.order[start:stop].tolist():
            shared += bool(seen & {*lists.row(sample)})
            seen |= {*lists.row(sample)}
    # 23 labels, and a batch has about 40: some samples must meet their like. They are counted, and
    # those beside which the first batch holds their like already.
    assert 0 < shared <= plan.header.num_broken < 80


@pytest.fixture(scope="module")
def explicit_runs(tmp_path_factory):
    """A run of texts that bring two negatives along, and the same killed after step 8."""
    folder = tmp_path_factory.mktemp("explicit")
    negatives = {"explicit": 2, "skip_nearest": 1, "planner": "greedy", "lead": "1 steps"}
    sections = {"labels": {"over": "batch"}, "train": {"duration": "11 steps", "chunk_size": 3}}
    config = planned_config(folder, negatives, text_config, **sections)
    run_ranks(2, planned_rank, config, str(folder / "whole"))
    with pytest.raises(AssertionError):
        run_ranks(2, planned_rank, config, str(folder / "killed"), "step 8")
    return config, folder


@pytest.mark.parametrize("then", [1, 2, 3])
def test_explicit_negatives_are_met_and_the_same_after_a_kill(explicit_runs, tmp_path, then):
    config, folder = explicit_runs
    whole, run = folder / "whole", tmp_path / "run"
    plan = BatchPlan.load(whole / "plans" / "plan-000000")
    lists = load_label_lists(build_samples(config).indexes)
    assert plan.negatives.shape == (90, 2)
    assert (plan.negatives >= 0).any(axis=1).sum() > 50  # 64 have been embedded, 3 without labels
    for sample, negatives in zip(plan.order, plan.negatives, strict=True):
        for other in negatives[negatives >= 0]:
            assert not set(lists.row(sample)) & set(lists.row(other)) and lists.row(other)
    lines = read_lines(whole)
    met = [lines[step]["num_negatives"] for step in sorted(lines)]
    assert np.mean(met[6:]) > np.mean(met[:5]) + 2  # the plan begins in step 6
    shutil.copytree(folder / "killed", run)
    run_ranks(then, planned_rank, config, str(run))
    check_epochs(run, 90)
    assert read_samples(run) == read_samples(whole)
    again, expected, found = read_lines(run), read_losses(whole), read_losses(run)
    assert [again[step]["num_negatives"] for step in sorted(again)] == met
    if then == 2:
        assert found == expected
    assert found == {step: pytest.approx(loss, rel=2e-4) for step, loss in expected.items()}


def test_margins_and_weights_of_a_table_reach_plans_and_losses(tmp_path):
    weighed = {f"{number:04d}": 0.0 if number % 2 else 3.0 for number in range(80)}
    names = list(weighed)
    table = {"key": names, "weight": list(weighed.values()), "margin": np.arange(80) / 80}
    pq.write_table(pa.table(table), tmp_path / "teacher.parquet")
    places = dict.fromkeys(("margins", "weights"), str(tmp_path / "teacher.parquet"))
    negatives = {"planner": "topics", "lead": "1 steps", "start_epoch": 0, "refresh": "2 epochs"}
    sections = {"labels": {"over": "batch"}, "train": {"duration": "7 steps"}}
    found = []
    for name, extra in (("weighed", places), ("plain", {})):
        config = planned_config(tmp_path, negatives | extra, text_config, **sections)
        run_ranks(2, planned_rank, config, str(tmp_path / name))
        check_epochs(tmp_path / name, 90)
        found.append(read_losses(tmp_path / name))
    config = planned_config(tmp_path, negatives | places, text_config, **sections)
    keys = [key.split(":")[1] for key in build_samples(config).keys(np.arange(90))]
    weights = np.array([weighed.get(key, 1.0) for key in keys])
    for plan in ("plan-000000", "plan-000001"):  # the second is the first's clusters, shuffled
        whole, plain = (
            BatchPlan.load(tmp_path / run / "plans" / plan) for run in ("weighed", "plain")
        )
        assert np.allclose(whole.row_weights, (weights / weights.mean())[whole.order])
        assert plain.row_weights is None
    assert not np.array_equal(whole.order, plain.order)  # margins deal other batches
    assert all(abs(found[0][step] - found[1][step]) > 0.01 for step in range(1, 8))


def test_controller_workers_locality_and_saves_behind_training(tmp_path):
    negatives = {
        "controller": True, "locality": 2, "unique": ["caption"], "refresh": "3 steps",
        "side": "images", "dim": 8, "band": [0.1, 0.5],
    }  # fmt: skip
    sections = {
        "data": {"workers": 2, "prefetch": 2},
        "checkpoint": {"background": True},
        "train": {"duration": "18 steps", "chunk_size": 3},
    }
    config = planned_config(tmp_path, negatives, **sections)
    run_ranks(2, planned_rank, config, str(tmp_path / "whole"))
    check_epochs(tmp_path / "whole")
    lines = read_lines(tmp_path / "whole")
    sizes = [lines[step]["cluster_size"] for step in sorted(lines) if "cluster_size" in lines[step]]
    assert sizes[0] == 4 and set(sizes) <= {1, 2, 4, 8, 16} and len(set(sizes)) > 1
    with pytest.raises(AssertionError):
        run_ranks(2, planned_rank, config, str(tmp_path / "killed"), "step 11")
    wait_for_workers(tmp_path / "killed")
    run_ranks(2, planned_rank, config, str(tmp_path / "killed"))
    assert read_samples(tmp_path / "killed") == read_samples(tmp_path / "whole")
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Eight epochs, each with a plan of its own from the second on, and two checkpoints kept."""
    folder = tmp_path_factory.mktemp("long")
    sections = {"train": {"duration": "30 steps"}, "checkpoint": {"keep_last": 2}}
    config = planned_config(folder, {"lead": "1 steps"}, **sections)
    run_ranks(1, planned_rank, config, str(folder / "run"))
    return config, folder / "run"


def plans_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "plans").iterdir())


def test_plans_that_no_checkpoint_needs_are_removed(long_run, tmp_path):
    config, whole = long_run
    check_epochs(whole)
    # Checkpoints of steps 27 and 30: of the epoch that begins at position 420, whose plan is 6.
    assert plans_of(whole) == ["plan-000006"]
    told = list(describe_plans(build_samples_with(whole, config), config))
    assert "steps 5 to 7: plan-000000, removed since: no checkpoint needs it" in told
    assert any("plan-000006, asked for at step 25: 60 samples" in line for line in told)
    run = tmp_path / "run"
    with pytest.raises(AssertionError):
        run_ranks(1, planned_rank, config, str(run), "step 22")
    # Step 18 is in the epoch from 240 on, of plan 3.
    assert plans_of(run) == ["plan-000003", "plan-000004", "plan-000005"]
    newest = run / "checkpoints" / "step-00000021"
    (newest / "state.json").write_text("{}")
    run_ranks(1, planned_rank, config, str(run))
    assert "step-00000018 at 288" in (run / "log" / "rank-0000.log").read_text()
    assert read_samples(run) == read_samples(whole) and read_losses(run) == read_losses(whole)
    assert plans_of(run) == ["plan-000006"]


def build_samples_with(run: Path, config):
    samples = build_samples(config)
    load_plans(run, samples)
    return samples


def test_a_kill_amid_a_removal_does_no_harm(long_run, tmp_path):
    config, whole = long_run
    run = tmp_path / "run"
    with pytest.raises(AssertionError):
        run_ranks(1, planned_rank, config, str(run), "prune 1")
    assert any(name.startswith(".removing-plan-") for name in plans_of(run))
    run_ranks(1, planned_rank, config, str(run))
    assert plans_of(run) == ["plan-000006"]
    assert read_samples(run) == read_samples(whole) and read_losses(run) == read_losses(whole)


def test_what_a_kept_checkpoint_needs_stays(tmp_path):
    sections = {"train": {"duration": "18 steps"}, "checkpoint": {"keep_last": 1}}
    sections["checkpoint"]["keep_every"] = "9 steps"
    config = planned_config(tmp_path, {"lead": "1 steps", "refresh": "2 epochs"}, **sections)
    run = tmp_path / "run"
    run_ranks(1, planned_rank, config, str(run))
    # Step 9 is in the epoch from 120 on, of plan 1; all that came later may be needed after it.
    assert plans_of(run) == ["plan-000001", "plan-000002", "plan-000003"]
    first = run / "checkpoints" / "step-00000009"
    expected, losses = read_samples(run), read_losses(run)
    shutil.rmtree(run / "checkpoints" / "step-00000018")
    assert first.is_dir()
    run_ranks(1, planned_rank, config, str(run))
    assert read_samples(run) == expected and read_losses(run) == losses


def test_the_first_plan_that_is_needed():
    table = [Segment(0, 60), Segment(60, 100, "plan-000000", version=0)]
    table += [
        Segment(100, 120, "plan-000001", version=1),
        Segment(120, 180, "plan-000002", version=2),
    ]
    needed = [first_needed(table, position, 60) for position in (0, 96, 119, 120, 176)]
    assert needed == [0, 0, 0, 2, 2]
    assert first_needed(table[:3], 120, 60) == 1, "its clusters may be shuffled"
    assert first_needed(table[:1], 48, 60) == 0


def refused_rank(group, config, run: str) -> str:
    try:
        train_rank(group, config, run)
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def test_bad_sections_are_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"negatives.side = 'images': a run with .* has texts"):
        Side(planned_config(tmp_path, {"side": "images"}, text_config))
    config = planned_config(tmp_path, {"controller": True, "grow_at": [2]})
    (told,) = run_ranks(1, refused_rank, config, str(tmp_path / "run"))
    assert "negatives.controller and negatives.grow_at both set the cluster size" in told


def test_damaged_plans_come_from_the_checkpoint_and_damaged_stores_are_told(whole, tmp_path):
    config = planned_config(whole.parent, NEGATIVES)

    def resume(damage) -> str:
        run = tmp_path / damage.__name__
        shutil.copytree(whole, run)
        newest = max((run / "checkpoints").glob("step-*"))
        shutil.rmtree(newest)  # so that there are steps to go
        damage(run, max((run / "checkpoints").glob("step-*")))
        (told,) = run_ranks(1, refused_rank, config, str(run))
        return told

    def tear_plan(run: Path, _: Path) -> None:
        path = run / "plans" / "plan-000004" / "order.npy"
        path.write_bytes(path.read_bytes()[:-8])

    def lose_plan(run: Path, _: Path) -> None:
        shutil.rmtree(run / "plans" / "plan-000004")

    def swap_plan(run: Path, _: Path) -> None:
        shutil.rmtree(run / "plans" / "plan-000004")
        shutil.copytree(run / "plans" / "plan-000002", run / "plans" / "plan-000004")

    def lose_all_plans(run: Path, _: Path) -> None:
        shutil.rmtree(run / "plans")

    def alter_header(run: Path, checkpoint: Path) -> None:
        shutil.rmtree(run / "plans")
        name = f"plans/{min((checkpoint / 'plans').glob('*.json')).name}"
        header = json.loads((checkpoint / name).read_text())
        replace_file(checkpoint, name, {**header, "asked_step": header["asked_step"] + 1})

    def other_store(_: Path, checkpoint: Path) -> None:
        replace_layout(checkpoint, fingerprint="0" * 32)

    def cut_store(_: Path, checkpoint: Path) -> None:
        part = checkpoint / "negatives" / "part-00000.safetensors"
        part.write_bytes(part.read_bytes()[:-10])

    for damage in (tear_plan, lose_plan, swap_plan, lose_all_plans):
        assert resume(damage) == ""
        assert read_samples(tmp_path / damage.__name__) == read_samples(whole)
    assert "the plan beside it is another one" in resume(alter_header)
    assert "its embeddings are of another run (fingerprint" in resume(other_store)
    assert resume(cut_store) == ""  # the checkpoint before it is whole, and is taken


def test_a_checkpoint_that_comes_alone_brings_its_plans(whole, tmp_path):
    newest = max((whole / "checkpoints").glob("step-*"))
    before = max(path for path in newest.parent.glob("step-*") if path != newest)
    run = tmp_path / "run"
    shutil.copytree(before, run / "checkpoints" / before.name)
    run_ranks(2, planned_rank, planned_config(whole.parent, NEGATIVES), str(run))
    expected = read_samples(whole)
    done = int(before.name.removeprefix("step-"))
    assert read_samples(run) == {step: expected[step] for step in range(done + 1, STEPS + 1)}


def replace_layout(checkpoint: Path, **changes) -> None:
    layout = json.loads((checkpoint / "negatives" / "layout.json").read_text())
    replace_file(checkpoint, "negatives/layout.json", {**layout, **changes})


def replace_file(checkpoint: Path, name: str, content: object) -> None:
    """With its entry in the manifest."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = write_file(checkpoint / name, content)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def gathered(group, num_rows: int) -> tuple | None:
    """Rows that are made from their id, dealt out in turn; the sample 3 comes twice."""
    ids = torch.arange(num_rows) % max(1, num_rows - 2) + 3
    mine = ids[group.rank() :: group.size()]
    rows = (mine[:, None] * torch.tensor([1.0, -2.0, 0.5]) / 64).half()
    counts = [len(range(rank, num_rows, group.size())) for rank in range(group.size())]
    return gather_by_id(rows, mine, counts, Ranks(group, group.rank(), group.size()))


@pytest.mark.parametrize(("world_size", "num_rows"), [(1, 7), (2, 7), (3, 8), (3, 2)])
def test_rows_of_all_ranks_reach_the_first(world_size, num_rows):
    first, *others = run_ranks(world_size, gathered, num_rows)
    assert others == [None] * (world_size - 1)
    ids, rows = first
    assert ids.tolist() == sorted({n % max(1, num_rows - 2) + 3 for n in range(num_rows)})
    assert np.allclose(rows, ids[:, None] * np.array([1.0, -2.0, 0.5]) / 64, atol=1e-3)


def test_wide_rows_are_projected_by_the_seed_alone():
    rows = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    here = torch.device("cpu")
    narrow = Projection(96, 32, seed=1, device=here)(rows)
    assert narrow.shape == (40, 32) and narrow.dtype == torch.float16
    assert torch.allclose(narrow.float().norm(dim=1), torch.ones(40), atol=1e-3)
    assert torch.equal(narrow, Projection(96, 32, seed=1, device=here)(rows * 3))
    assert not torch.equal(narrow, Projection(96, 32, seed=2, device=here)(rows))
    assert Projection(16, 64, seed=1, device=here).dim == 16


@pytest.mark.parametrize("later", [False, True])
def test_a_store_comes_back_bit_for_bit(tmp_path, later, monkeypatch):
    monkeypatch.setattr("trainer.planning.stored._PART_ROWS", 7)
    monkeypatch.setattr("trainer.planning.stored._PIECE_ROWS", 3)
    store = EmbeddingStore.create(tmp_path / "store", 20, 5, fingerprint="x")
    rng = np.random.default_rng(0)
    store.write(rng.permutation(20)[:13], rng.normal(size=(13, 5)).astype(np.float32), 4)
    files = store_files(store, later=later)
    rows, steps = store.part(0, 20)
    if later:  # what training writes meanwhile is not in it
        store.write(np.arange(20), np.ones((20, 5), np.float32), 5)
    for name, content in files.items():
        write_file(tmp_path / "saved" / name, content)
    other = EmbeddingStore.create(tmp_path / "other", 20, 5, fingerprint="x")
    restore_store(other, tmp_path / "saved")
    assert np.array_equal(other.part(0, 20)[0], rows) and np.array_equal(other.steps, steps)
    wide = EmbeddingStore.create(tmp_path / "wide", 20, 6, fingerprint="x")
    with pytest.raises(ConfigError, match=r"dim = 5, this run has 6"):
        restore_store(wide, tmp_path / "saved")
    with pytest.raises(ConfigError, match="holds no embedding store"):
        restore_store(wide, tmp_path)


def test_a_job_that_fails_says_why():
    def fail() -> int:
        raise DataError("embeddings of samples 3, 4 are not finite")

    job = Job(fail)
    with pytest.raises(DataError, match="could not be made: embeddings of samples 3, 4"):
        job.result()
    slow = Job(lambda: time.sleep(0.3) or 5)
    assert not slow.is_done() and slow.is_done(10.0)
    assert slow.result() == 5 and slow.seconds >= 0.3


def test_the_plans_of_a_run_are_told(whole):
    config = planned_config(whole.parent, NEGATIVES)
    samples = build_samples(config)
    load_plans(whole, samples)
    lines = list(describe_plans(samples, config))
    assert lines[0] == "steps 1 to 3: in the plain order" and "shards in a batch" in lines[1]
    assert sum("plan-0000" in line for line in lines) == 5
    assert any(line.startswith("steps 5 to 6: plan-000000, asked for at step 2") for line in lines)
    keys = samples.keys(samples.batch(6, BATCH).ids)
    assert keys == read_samples(whole)[7]
    plain = build_samples(planned_config(whole.parent, {}, data={"batching": "plain"}))
    with pytest.raises(ConfigError, match="its batches are not planned"):
        load_plans(whole, plain)
