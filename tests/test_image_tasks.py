"""Image tasks end to end: shards and `.bin` sets through models, tables and ranks to numbers."""

import json
import pickle
from pathlib import Path

import metric_oracles
import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_tables import write_ijb
from tiny_faces import face_config, write_faces
from tiny_runs import MODEL, train_rank
from torch import Tensor, nn

from data.augment import ImageTransform
from data.decode import decode_image
from data.errors import DataError
from data.index import load_index
from data.read import Reader
from launch.runs import evaluate_rank
from trainer.config import Config, ConfigError, parse_config
from trainer.models.faces import FaceEmbeddings
from trainer.objectives import build_model
from trainer.ranks import Ranks
from trainer.validate import Validation, open_sets

ALL = ["recall", "verification", "identification", "all_pairs", "ijb"]


class Sketch(nn.Module):
    """A fixed projection of the pixels, rows of any length: what a backbone gives, at no cost."""

    image_size = (16, 16)
    resize_mode = "squash"
    tokenizer_spec = None

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(16 * 16 * 3, 3, generator=generator).double())
        self.passes = 0

    def forward(self, images: Tensor) -> FaceEmbeddings:
        assert not self.training and not torch.is_grad_enabled()
        self.passes += 1
        return FaceEmbeddings(((images.double() - 127).flatten(1) @ self.matrix).float())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Faces of 11 people, a table of pairs, one of roles and IJB's three, all of their keys."""
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder / "faces")
    rng = np.random.default_rng(1)
    lines = ["key_a\tkey_b\tsame"]
    for number in range(60):
        one, two = rng.integers(0, 11, 2) if number % 2 else [number // 2 % 11] * 2
        a, b = rng.choice(6, 2, replace=False)
        lines.append(f"{one:03d}_{a}\t{two:03d}_{b}\t{one == two:d}")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    roles = [
        "gallery" if copy < 2 and who < 8 else "probe" for who in range(11) for copy in range(6)
    ]
    rows = [f"{i // 6:03d}_{i % 6}\t{role}" for i, role in enumerate(roles)]
    (folder / "roles.tsv").write_text("\n".join(["key\trole", *rows]) + "\n")
    names = [f"{i // 6:03d}_{i % 6}.png" for i in range(66)]
    pairs = [(a, b) for a in range(22) for b in range(a)]
    write_ijb(
        folder / "meta",
        face_tid_mid="".join(f"{n} {100 + i // 3} {i % 2}\n" for i, n in enumerate(names)),
        template_pair_label="".join(
            f"{100 + a} {100 + b} {a // 2 == b // 2:d}\n" for a, b in pairs
        ),
        name_5pts_score="".join(f"{n} {'1 ' * 10}{0.5 + i / 99}\n" for i, n in enumerate(names)),
    )
    return folder


def config_of(folder: Path, **evaluation) -> Config:
    """A run of 8 steps, judged by the tables of `folder`."""
    tables = {"pairs": str(folder / "pairs.tsv"), "ijb": str(folder / "meta"), "bootstrap": 9}
    return face_config(
        folder,
        data={"val_shards": str(folder / "faces/f-{0..2}.tar")},
        train={"duration": "8 steps"},
        eval={"fars": [1e-3, 0.05], "fpirs": [0.1], **tables, **evaluation},
    )


def judge(config: Config, ranks: Ranks | None = None, model: nn.Module | None = None) -> dict:
    model = (model or Sketch()).eval()
    validation = Validation.build(config, model, ranks or Ranks(), config.data.val_shards)
    results = validation(model)
    return results | {"passes": getattr(model, "passes", 0)}


def embedded(
    folder: Path, *, flip: bool = False, turned: int = 0
) -> tuple[np.ndarray, list[str], list[int]]:
    """Rows, keys and labels, one image after the other."""
    index = load_index(str(folder / "faces/f-{0..2}.tar"), caption_key="")
    model, transform = Sketch().eval(), ImageTransform(16, None, resize_mode="squash")
    entries = index.entries(range(len(index)))
    parts = [entry.part("png") for entry in entries]
    reader = Reader(cache_dir=None, cache_bytes=0, versions={})
    spans = [(entry.shard, p.offset, p.size) for entry, p in zip(entries, parts, strict=True)]
    rows = []
    with torch.no_grad():
        for member in reader.read_many(spans):
            image = transform(decode_image(member), None)[None].rot90(turned, dims=(2, 3))
            row = model(image).rows[0]
            rows.append(row + model(image.flip(-1)).rows[0] if flip else row)
    return torch.stack(rows).double().numpy(), [e.key for e in entries], [e.label for e in entries]


def test_quarter_turns_take_the_mean_cosine_over_four_views(folder):
    results = judge(config_of(folder, tasks=("recall",), quarter_turns=True, batch_size=7))
    views = [embedded(folder, turned=quarters)[0] for quarters in range(4)]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in views]
    assert np.abs(units[0] @ units[0].T - units[1] @ units[1].T).max() > 1e-3, "views differ"
    labels = embedded(folder)[2]
    rows = np.concatenate(units, axis=1) / 2  # cosines of these are the mean of the views'
    recall, _ = metric_oracles.leave_one_out(rows.astype(np.float32), list(range(66)), labels, 1)
    assert results["recall_R@1"] == pytest.approx(recall, abs=1e-12)
    assert results["quarter_turns"] == 1


@pytest.mark.parametrize("flip", [False, True])
def test_every_task_equals_its_loop_over_decoded_images(folder, flip):
    results = judge(config_of(folder, tasks=ALL, flip=flip, gallery=str(folder / "roles.tsv")))
    rows, keys, labels = embedded(folder, flip=flip)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    assert results["flip"] == flip and results["num_images"] == 66
    units = (rows / lengths).astype(np.float32)
    recall, precision = metric_oracles.leave_one_out(units, list(range(66)), labels, 1)
    assert results["recall_R@1"] == pytest.approx(recall, abs=1e-12)
    assert results["recall_MAP@R"] == pytest.approx(precision, abs=1e-12)
    assert 0.3 < recall < 1
    pairs = [row.split("\t") for row in (folder / "pairs.tsv").read_text().splitlines()[1:]]
    table = metric_oracles.cosines(units)
    scores = [float(table[keys.index(a), keys.index(b)]) for a, b, _ in pairs]
    same = [flag == "1" for *_, flag in pairs]
    accuracy, _ = metric_oracles.fold_accuracy(scores, same)
    assert results["verification_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    tar = metric_oracles.tar_at_far(scores, same, 0.05)
    assert results["verification_TAR@FAR=5e-2"] == tar
    roles = [row.split("\t") for row in (folder / "roles.tsv").read_text().splitlines()[1:]]
    gallery, probes = (
        [keys.index(key) for key, role in roles if role == wanted]
        for wanted in ("gallery", "probe")
    )
    rank, fnir, _ = metric_oracles.identification(units, gallery, probes, labels, 1, 0.1)
    assert results["identification_rank-1"] == pytest.approx(rank, abs=1e-12)
    assert results["identification_FNIR@FPIR=1e-1"] == pytest.approx(fnir, abs=1e-12)
    pair_of = [(i, j) for i in range(66) for j in range(i)]
    scores = [float(table[i, j]) for i, j in pair_of]
    tar = metric_oracles.tar_at_far(scores, [labels[i] == labels[j] for i, j in pair_of], 0.05)
    low = results["all_pairs_TAR@FAR=5e-2"]
    assert low <= tar <= low + results["all_pairs_TAR@FAR=5e-2_error"]
    weights = {f"{i // 6:03d}_{i % 6}": np.float32(0.5 + i / 99) for i in range(66)}
    weighted = {key: rows[keys.index(key)] * weights[key] for key in keys}
    names = sorted(keys)
    templates = [
        metric_oracles.template(
            [[weighted[names[i]] for i in range(3 * t, 3 * t + 3) if i % 2 == m] for m in (0, 1)]
        ).astype(np.float64)
        for t in range(22)
    ]
    pair_of = [(a, b) for a in range(22) for b in range(a)]
    scores = [round(float(templates[a] @ templates[b]), 6) for a, b in pair_of]
    tar = metric_oracles.tar_at_far(scores, [a // 2 == b // 2 for a, b in pair_of], 0.05)
    name = f"ijb_N1D1F{flip:d}_TAR@FAR=5e-2"
    assert results[name] == pytest.approx(tar, abs=1e-12)
    assert results[f"{name}_low"] <= results[f"{name}_high"]


def _judge_on_ranks(group, config: Config) -> dict:
    return judge(config, Ranks(group, group.rank(), group.size(), group.rank()))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_number_is_the_same_at_any_world_size(folder, world_size):
    config = config_of(folder, tasks=ALL, flip=True, batch_size=7)
    whole = judge(config)
    ranks = run_ranks(world_size, _judge_on_ranks, config)
    assert len({found["passes"] for found in ranks}) == 1, "ZeRO 3 needs equally many passes"
    for found in ranks:
        assert found | {"passes": 0} == whole | {"passes": 0}


def test_flags_are_in_the_names_and_the_rule_enrols_without_a_table(folder):
    results = judge(
        config_of(folder, tasks=["ijb", "identification"], ijb_norm=False, ijb_score=False)
    )
    assert "ijb_N0D0F0_TAR@FAR=1e-3" in results
    # one of six images enrols, of the labels that are not drawn to stay out
    enrolled = results["num_identification_mated"] // 5
    assert 5 <= enrolled <= 11
    assert results["num_identification_non_mated"] == 6 * (11 - enrolled)


# ---------------------------------------------------------------- .bin sets


def write_bin(path: Path, folder: Path, seed: int) -> str:
    """Twenty pairs of the faces as insightface keeps them."""
    index = load_index(str(folder / "faces/f-{0..2}.tar"), caption_key="")
    rng = np.random.default_rng(seed)
    images, same = [], []
    for number in range(20):
        one = rng.integers(11)
        two = one if number % 2 else (one + 1) % 11
        for who in (one, two):
            (entry,) = index.entries([rng.choice(np.flatnonzero(index.labels == who))])
            images.append(read_image(entry))
        same.append(bool(one == two))
    path.write_bytes(pickle.dumps((images, same), 2))
    return str(path)


def read_image(entry) -> bytes:
    part = entry.part("png")
    with open(entry.shard, "rb") as file:
        file.seek(part.offset)
        return file.read(part.size)


def test_bin_sets_one_or_several_beside_shards(folder, tmp_path):
    lfw, cfp = (
        write_bin(tmp_path / f"{name}.bin", folder, i) for i, name in enumerate(("lfw", "cfp"))
    )
    alone = judge(config_of(folder).model_copy(update={"data": data_of(folder, lfw)}))
    assert alone["num_verification_genuine"] == 10 and alone["num_images"] == 40
    assert "recall_R@1" not in alone
    shards = str(folder / "faces/f-*.tar")
    config = config_of(folder, tasks=[], roc=str(tmp_path / "x" / "roc.tsv"))
    several = judge(config.model_copy(update={"data": data_of(folder, [shards, lfw, cfp])}))
    assert several["lfw_verification_AUC"] == alone["verification_AUC"]
    assert several["num_cfp_verification_genuine"] == 10
    assert several["num_images"] == 66 and several["recall_R@1"] > 0.3
    assert 0 < several["verification_AUC"] <= 1, "the shards' own pairs"
    _head, *lines = (tmp_path / "x" / "roc.tsv").read_text().splitlines()
    names = dict.fromkeys(line.split("\t")[0] for line in lines)
    assert list(names) == ["verification", "lfw_verification", "cfp_verification"]


def data_of(folder: Path, shards):
    return config_of(folder).data.model_copy(update={"val_shards": shards})


def _judge_bin(group, config: Config) -> dict:
    return _judge_on_ranks(group, config)


def test_a_bin_set_is_the_same_at_any_world_size(folder, tmp_path):
    data = data_of(folder, write_bin(tmp_path / "lfw.bin", folder, 3))
    config = config_of(folder, batch_size=7, flip=True).model_copy(update={"data": data})
    whole = judge(config)
    for found in run_ranks(3, _judge_bin, config):
        assert found | {"passes": 0} == whole | {"passes": 0}


# ---------------------------------------------------------------- models


def test_the_image_tower_of_a_two_tower_is_verified_without_captions(folder, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    tree = {
        "data": {"val_shards": str(folder / "faces/f-{0..2}.tar"), "workers": 0},
        "model": {"name": str(tmp_path / "model.json")},
        "train": {"precision": "fp32"},
        "eval": {"tasks": ["verification", "recall"], "pairs": str(folder / "pairs.tsv")},
    }
    config = parse_config(tree, "towers")
    results = judge(config, model=build_model(config))
    assert 0 < results["verification_AUC"] <= 1 and 0 < results["recall_R@1"] <= 1
    with pytest.raises(DataError, match="no sample has a member that ends in txt"):
        open_sets(parse_config(tree | {"eval": {}}, "towers"), config.data.val_shards)
    names = tmp_path / "names"
    names.write_text("".join(f"person {i}\n" for i in range(11)))
    tree["eval"] = {"tasks": ["zero_shot"], "classes": str(names)}
    config = parse_config(tree, "towers")
    assert judge(config, model=build_model(config))["num_labelled"] == 66


@pytest.mark.parametrize(
    ("evaluation", "error", "named"),
    [
        ({"tasks": ["retrieval"]}, ConfigError, "retrieval needs texts, and loss.name = 'arcface'"),
        ({"tasks": ["verification"], "pairs": ""}, ConfigError, "verification needs pairs: name a"),
        ({"tasks": ["ijb"], "ijb": ""}, ConfigError, "ijb needs its tables"),
        ({"tasks": ["verification"], "pairs": "no.tsv"}, DataError, r"no\.tsv: cannot be read"),
        ({"tasks": ["identification"], "gallery": "no.tsv"}, DataError, r"no\.tsv: cannot be"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_embedded(folder, evaluation, error, named):
    config = config_of(folder, **evaluation)
    with pytest.raises(error, match=named):
        open_sets(config, config.data.val_shards)


def test_labels_and_bin_sets_that_do_not_fit(folder, tmp_path):
    lfw = write_bin(tmp_path / "lfw.bin", folder, 0)
    config = config_of(folder, tasks=["recall"])
    with pytest.raises(ConfigError, match=r"a \.bin set is only verified: --task verification"):
        open_sets(config, lfw)
    config = config_of(folder, tasks=["verification"], pairs="")
    with pytest.raises(ConfigError, match="verification needs pairs"):
        open_sets(config, [lfw, config.data.val_shards])
    data = config.data.model_copy(update={"label_key": "nothing"})
    for task in ("recall", "all_pairs", "identification"):
        config = config_of(folder, tasks=[task]).model_copy(update={"data": data})
        with pytest.raises(DataError, match=f"{task} needs labels, and no sample of"):
            open_sets(config, config.data.val_shards)


# ---------------------------------------------------------------- a run


def test_a_face_run_is_evaluated_while_it_trains_and_after(folder, tmp_path, monkeypatch):
    config = config_of(folder, every="4 steps")
    run = tmp_path / "run"
    assert run_ranks(2, train_rank, config, str(run)) == [True, True]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    found = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    assert sorted(found) == [4, 8]
    assert found[8]["recall_R@1"] > 0.3 and 0 < found[8]["verification_AUC"] <= 1
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # set by what opens a group of one, and taken back at the end
        monkeypatch.delenv(name)
    again = evaluate_rank(run, [])
    assert again.pop("checkpoint") == str(run / "checkpoints" / "step-00000008")
    assert again == pytest.approx(found[8], abs=1e-6)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    more = evaluate_rank(run, ['--eval.tasks=["all_pairs","identification"]', "--eval.flip=true"])
    assert more["num_all_pairs_genuine"] == 11 * 15 and more["identification_rank-10"] > 0.5
    assert more["flip"] == 1
