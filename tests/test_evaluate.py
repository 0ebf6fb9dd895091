"""Every number of an evaluation against a naive float64 one, at any world size, tile and deal."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from data.loader import EvalBatch
from trainer.config import ConfigError, EvalConfig
from trainer.evaluate import evaluate
from trainer.evaluate.classes import ClassNames, class_prompts, load_class_names
from trainer.evaluate.cosines import NUM_BINS, cosine_histograms
from trainer.evaluate.nearest import nearest, sort_keys, split_keys
from trainer.evaluate.retrieval import retrieval
from trainer.evaluate.zero_shot import class_embedding, zero_shot
from trainer.ranks import Ranks


class Embeddings(NamedTuple):
    images: Tensor | None
    texts: Tensor | None


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=1)


def ranks_of(group) -> Ranks:
    if group is None:
        return Ranks()
    return Ranks(group=group, rank=group.rank(), world_size=group.size())


def deal(rows: Tensor, bounds: list[int], rank: int) -> Tensor:
    """This rank's rows of a set cut at `bounds`."""
    return rows[bounds[rank] : bounds[rank + 1]]


# ---------------------------------------------------------------- nearest


def naive_nearest(queries: Tensor, gallery: Tensor, ids: Tensor, k: int) -> list[list[int]]:
    """Sort every (cosine, id) pair of a query: higher cosine first, then lower id."""
    cosines = (queries.double() @ gallery.double().T).float()
    found = []
    for row in cosines.tolist():
        pairs = sorted(zip(row, ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
        found.append([number for _, number in pairs[:k]])
    return found


def test_keys_sort_as_cosines_then_falling_ids():
    cosines = torch.tensor([[-1.0, -0.5, -0.0, 0.0, 1e-45, 0.5, 1.0, torch.inf, torch.nan]])
    ids = torch.tensor([0, 2**32 - 1, 7, 7, 5, 4, 3, 2, 1])
    keys = sort_keys(cosines, ids)[0]
    assert keys[2] == keys[3], "-0.0 and 0.0 are one cosine"
    assert (keys[[8, 0, 1, 3, 4, 5, 6, 7]].diff() > 0).all(), "NaN is below everything"
    back, back_ids = split_keys(keys)
    assert back_ids.tolist() == ids.tolist()
    assert back[:8].tolist() == cosines[0, :8].tolist()
    low, high = sort_keys(torch.zeros(1, 2), torch.tensor([9, 3]))[0]
    assert low < high, "of equal cosines the lower id is first"


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (512, 4096)])
def test_nearest_is_a_stable_sort_for_any_tile(tiles):
    gallery = unit_rows(60, 5, 0)
    gallery[20:40] = gallery[:20]  # every one of these ties with another
    gallery[55:] = 0
    queries = torch.cat([gallery[:10], unit_rows(15, 5, 1), torch.zeros(2, 5)])
    ids = torch.randperm(60, generator=torch.Generator().manual_seed(2)) * 1000
    cosines, found = nearest(
        queries, gallery, ids, 13, None, query_tile=tiles[0], gallery_tile=tiles[1]
    )
    assert found.tolist() == naive_nearest(queries, gallery, ids, 13)
    place = {number: row for row, number in enumerate(ids.tolist())}
    rows = torch.tensor([[place[number] for number in row] for row in found.tolist()])
    expected = (queries.double()[:, None] * gallery.double()[rows]).sum(-1)
    torch.testing.assert_close(cosines.double(), expected, rtol=1e-7, atol=1e-9)


def _nearest_on_ranks(group, queries, gallery, ids, k, query_bounds, gallery_bounds):
    rank = group.rank()
    here = [deal(queries, query_bounds, rank)]
    here += [deal(rows, gallery_bounds, rank) for rows in (gallery, ids)]
    return nearest(*here, k, group, gallery_tile=7)


@pytest.mark.parametrize(
    ("query_bounds", "gallery_bounds"),
    [
        ([0, 9, 21], [0, 30, 30]),
        ([0, 0, 20, 21], [0, 1, 18, 30]),
        ([0, 5, 5, 5, 21], [0, 0, 0, 29, 30]),
    ],
)
def test_nearest_is_the_same_on_ranks(query_bounds, gallery_bounds):
    queries, gallery = unit_rows(21, 6, 3), unit_rows(30, 6, 4)
    gallery[10:20] = gallery[:10]
    ids = torch.arange(30).flip(0)
    world_size = len(query_bounds) - 1
    parts = run_ranks(
        world_size, _nearest_on_ranks, queries, gallery, ids, 8, query_bounds, gallery_bounds
    )
    cosines, found = nearest(queries, gallery, ids, 8, None)
    assert torch.equal(torch.cat([part[0] for part in parts]), cosines)
    assert torch.equal(torch.cat([part[1] for part in parts]), found)


def test_nearest_of_a_gallery_smaller_than_k_or_empty():
    queries = unit_rows(4, 3, 5)
    assert nearest(queries, unit_rows(2, 3, 6), torch.arange(2), 10, None)[1].shape == (4, 2)
    nothing = torch.zeros(0, 3)
    assert nearest(queries, nothing, torch.arange(0), 10, None)[1].shape == (4, 0)
    assert nearest(nothing, queries, torch.arange(4), 10, None)[1].shape == (0, 4)


# ---------------------------------------------------------------- retrieval


def naive_retrieval(images, texts, image_ids, owners, captions, k) -> tuple[float, float]:
    """Recall at k both ways by sorting, with equal captions merged into one text."""
    first: dict = {}
    owned: dict = {}
    for row in sorted(range(len(owners)), key=lambda row: owners[row]):
        first.setdefault(captions[row], row)
        owned.setdefault(captions[row], set()).add(owners[row])
    names = list(first)  # in order of their first owner
    by_id = sorted(range(len(image_ids)), key=lambda row: image_ids[row])

    def cosine(image_row: int, caption) -> float:
        pair = images[image_row].double() @ texts[first[caption]].double()
        return float(pair.float())

    to_text, to_image = [], []
    for row, number in enumerate(image_ids):
        if any(number in owned[name] for name in names):
            ranked = sorted(names, key=lambda name: -cosine(row, name))
            to_text.append(any(number in owned[name] for name in ranked[:k]))
    for name in names:
        if owned[name] & set(image_ids):
            ranked = sorted(by_id, key=lambda row: -cosine(row, name))
            to_image.append(any(image_ids[row] in owned[name] for row in ranked[:k]))
    return sum(to_text) / len(to_text), sum(to_image) / len(to_image)


def caption_set(seed: int, num_images: int = 24, dim: int = 6):
    """Images with 0 to 4 captions, some captions shared by images, some repeated on one image."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.randperm(1000, generator=generator)[:num_images].sort().values
    images = unit_rows(num_images, dim, seed)
    counts = torch.randint(0, 5, (num_images,), generator=generator)
    owner_rows = torch.arange(num_images).repeat_interleave(counts)
    captions = torch.randint(0, 40, (len(owner_rows),), generator=generator)
    texts = F.normalize(unit_rows(40, dim, seed + 1)[captions] + images[owner_rows], dim=1)
    for caption in captions.unique():
        rows = (captions == caption).nonzero()[:, 0]
        texts[rows] = texts[rows[0]].clone()
    return images, texts, image_ids, owner_rows, captions


def _retrieve(group, images, texts, image_ids, owner_rows, captions, bounds):
    rank = 0 if group is None else group.rank()
    start, end = bounds[rank], bounds[rank + 1]
    mine = (owner_rows >= start) & (owner_rows < end)
    return retrieval(
        images[start:end],
        texts[mine],
        image_ids[start:end],
        image_ids[owner_rows[mine]],
        group,
        caption_ids=None if captions is None else captions[mine],
        ks=(1, 3, 5),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shared", [True, False])
def test_retrieval_equals_sorting(seed, shared):
    images, texts, image_ids, owner_rows, captions = caption_set(seed)
    results = _retrieve(
        None, images, texts, image_ids, owner_rows, captions if shared else None, [0, 24]
    )
    names = captions.tolist() if shared else list(range(len(captions)))
    for k in (1, 3, 5):
        expected = naive_retrieval(
            images, texts, image_ids.tolist(), image_ids[owner_rows].tolist(), names, k
        )
        found = results[f"image_to_text_R@{k}"], results[f"text_to_image_R@{k}"]
        assert found == pytest.approx(expected, abs=1e-12), k
    assert results["num_texts"] == len(set(names))
    assert 0 < results["image_to_text_R@1"] < 1


@pytest.mark.parametrize("bounds", [[0, 7, 24], [0, 0, 23, 24], [0, 11, 11, 17, 24]])
def test_retrieval_is_the_same_at_any_world_size(bounds):
    images, texts, image_ids, owner_rows, captions = caption_set(9)
    arguments = (images, texts, image_ids, owner_rows, captions)
    whole = _retrieve(None, *arguments, [0, 24])
    for results in run_ranks(len(bounds) - 1, _retrieve, *arguments, bounds):
        assert results == whole


def test_retrieval_of_one_caption_each_is_top_k_accuracy():
    from sklearn.metrics import top_k_accuracy_score

    images = unit_rows(50, 8, 1)
    texts = F.normalize(images + 0.8 * unit_rows(50, 8, 2), dim=1)
    ids = torch.arange(50)
    results = retrieval(images, texts, ids, ids, None)
    cosines = (images.double() @ texts.double().T).numpy()
    for k in (1, 5, 10):
        for name, scores in (("image_to_text", cosines), ("text_to_image", cosines.T)):
            expected = top_k_accuracy_score(np.arange(50), scores, k=k)
            assert results[f"{name}_R@{k}"] == pytest.approx(expected, abs=1e-12)


def test_constant_and_broken_embeddings_score_at_chance():
    ids = torch.arange(40)
    for rows in (unit_rows(1, 4, 0).repeat(40, 1), torch.full((40, 4), torch.nan)):
        results = retrieval(rows, rows, ids, ids, None)
        for way in ("image_to_text", "text_to_image"):
            assert [results[f"{way}_R@{k}"] for k in (1, 5, 10)] == [1 / 40, 5 / 40, 10 / 40]


def test_an_image_that_comes_twice_is_an_error():
    rows = unit_rows(3, 4, 0)
    with pytest.raises(ValueError, match="image id 5 comes twice"):
        retrieval(rows, rows, torch.tensor([5, 1, 5]), torch.tensor([5, 1, 5]), None)


# ---------------------------------------------------------------- zero-shot


def test_zero_shot_equals_scikit_learn():
    from sklearn.metrics import top_k_accuracy_score

    images, classes = unit_rows(80, 6, 1), unit_rows(12, 6, 2)
    labels = torch.randint(0, 12, (80,), generator=torch.Generator().manual_seed(3))
    labels[labels == 4] = 5  # a class without images
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    results = zero_shot(images, labels, classes[order], order, None)
    scores = (images.double() @ classes.double().T).numpy()
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(labels.numpy(), scores, k=k, labels=np.arange(12))
        assert results[f"zero_shot_top{k}"] == pytest.approx(expected, abs=1e-12)
    right = scores.argmax(1) == labels.numpy()
    means = [right[labels.numpy() == label].mean() for label in labels.unique().tolist()]
    assert results["zero_shot_mean_per_class"] == pytest.approx(np.mean(means), abs=1e-12)


def test_images_without_a_class_are_not_counted():
    classes = torch.eye(3)
    labels = torch.tensor([0, 1, -1, 77, 0])
    results = zero_shot(classes[[0, 1, 2, 2, 1]], labels, classes, torch.arange(3), None)
    assert results["num_labelled"] == 3
    assert results["zero_shot_top1"] == pytest.approx(2 / 3)
    assert results["zero_shot_mean_per_class"] == pytest.approx((1 / 2 + 1) / 2)
    with pytest.raises(ValueError, match="none of the images has a label among the 3 classes"):
        zero_shot(classes, torch.tensor([-1, 5, 9]), classes, torch.arange(3), None)


def test_class_embedding_is_open_clips():
    import open_clip

    class Model(nn.Module):
        def encode_text(self, texts: Tensor, normalize: bool) -> Tensor:
            return F.normalize(texts.float(), dim=-1)

    prompts = torch.randint(1, 9, (80, 6), generator=torch.Generator().manual_seed(0))
    expected = open_clip.build_zero_shot_classifier(
        Model(),
        tokenizer=lambda texts: prompts,
        classnames=["cat"],
        templates=open_clip.OPENAI_IMAGENET_TEMPLATES,
    )[:, 0]
    ours = class_embedding(F.normalize(prompts.float(), dim=-1))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_prompts_and_templates():
    import open_clip

    names = ClassNames(3, ("cat", "kitten"))
    assert class_prompts(names, ["a {}.", "{}"]) == ["a cat.", "a kitten.", "cat", "kitten"]
    openai = class_prompts(ClassNames(0, ("dog",)), ["openai"])
    assert openai == [fill("dog") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(openai) == 80
    with pytest.raises(ConfigError, match=r"has no \{\} for the class name"):
        class_prompts(names, ["a photo"])


def test_class_names_from_a_list_and_from_tables(tmp_path: Path):
    path = tmp_path / "names"
    path.write_text("cat\nsiamese cat\n")
    assert load_class_names(str(path)) == [
        ClassNames(0, ("cat",)),
        ClassNames(1, ("siamese cat",)),
    ]
    path.write_text('cls\tgroup\tlabel\n7\tx\t"quoted"\n2\ty\tcat\n7\tx\tother name\n')
    assert load_class_names(str(path)) == [
        ClassNames(2, ("cat",)),
        ClassNames(7, ('"quoted"', "other name")),
    ]
    path.write_text("cls\tlabel\tname\n0\tnot this\tthis\n")
    assert load_class_names(str(path)) == [ClassNames(0, ("this",))]
    assert len(load_class_names("imagenet")) == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 is empty"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cls\tcaption\n0\tcat\n", "needs columns cls and name"),
        ("cls\tname\nx\tcat\n", "line 2: cls must be an integer"),
        ("cls\tname\n1\n", "line 2: cls must be an integer"),
        ("cls\tname\n", "no classes"),
        ("cls\tname\n99999999999\tcat\n", "line 2: cls must be an integer"),
        (None, "cannot be read"),
    ],
)
def test_class_names_that_do_not_fit_are_one_clear_line(tmp_path: Path, text, message):
    path = tmp_path / "names.tsv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_class_names(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- histograms


def naive_histograms(images: Tensor, texts: Tensor, ids: list[int]) -> dict[str, np.ndarray]:
    cosines = images.double() @ texts.double().T
    positive = [float(cosines[i, i]) for i in range(len(ids))]
    hardest = []
    for i in range(len(ids)):
        others = [float(cosines[i, j]) for j in range(len(ids)) if ids[j] != ids[i]]
        hardest += [max(others)] if others else []
    edges = np.linspace(-1, 1, NUM_BINS + 1)
    return {
        "positive": np.histogram(positive, edges)[0],
        "hardest_negative": np.histogram(hardest, edges)[0],
    }


def _histograms(group, images, texts, ids, bounds):
    return cosine_histograms(
        *(deal(rows, bounds, group.rank()) for rows in (images, texts, ids)), group
    )


def test_cosine_histograms_over_ranks():
    images, texts = unit_rows(30, 5, 0), unit_rows(30, 5, 1)
    ids = torch.arange(30) % 25  # five samples are drawn twice
    expected = {k: v.tolist() for k, v in naive_histograms(images, texts, ids.tolist()).items()}
    assert cosine_histograms(images, texts, ids, None) == expected
    for bounds in ([0, 13, 30], [0, 0, 30, 30]):
        for found in run_ranks(len(bounds) - 1, _histograms, images, texts, ids, bounds):
            assert found == expected


def test_histograms_at_the_ends_and_without_negatives():
    row = F.normalize(torch.ones(1, 7), dim=1)
    histograms = cosine_histograms(row.repeat(3, 1), row.repeat(3, 1), torch.zeros(3), None)
    assert histograms["positive"][-1] == 3
    assert sum(histograms["hardest_negative"]) == 0
    opposite = cosine_histograms(row, -row, torch.zeros(1), None)
    assert opposite["positive"][0] == 1


# ---------------------------------------------------------------- evaluate


class LinearTowers(nn.Module):
    """Two linear towers: what a real model gives, at no cost; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(3 * 4 * 4, 8, generator=generator))
        self.text = nn.Parameter(torch.randn(500, 8, generator=generator))
        self.passes = 0

    def forward(self, images: Tensor | None = None, texts: Tensor | None = None) -> Embeddings:
        assert not self.training and not torch.is_grad_enabled()
        self.passes += 1
        rows = words = None
        if images is not None:
            rows = F.normalize((images.float() / 255 - 0.5).flatten(1) @ self.image, dim=1)
        if texts is not None:
            words = F.normalize(self.text[texts].sum(1), dim=1)
        return Embeddings(rows, words)


def tokenize(texts: list[str]) -> Tensor:
    codes = [[ord(letter) % 500 for letter in text[:5].ljust(5)] for text in texts]
    return torch.tensor(codes, dtype=torch.int64).reshape(len(texts), 5)


def eval_samples(num_images: int) -> list[tuple[Tensor, int, int, list[str]]]:
    """(pixels, id, label, captions) of a small set; captions name the label, some repeat."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for number in range(num_images):
        pixels = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        label = number % 6 if number % 11 else -1
        captions = [f"{label}{'abc'[i]}{number % 9}" for i in range(number % 3 + 1)]
        samples.append((pixels, number * 3, label, captions))
    return samples


def batch_of(samples) -> EvalBatch:
    captions = [caption for sample in samples for caption in sample[3]]
    rows = [row for row, sample in enumerate(samples) for _ in sample[3]]
    return EvalBatch(
        images=torch.stack([sample[0] for sample in samples]),
        ids=torch.tensor([sample[1] for sample in samples]),
        labels=torch.tensor([sample[2] for sample in samples]),
        texts=tokenize(captions),
        text_owner=torch.tensor(rows),
        keys=[str(sample[1]) for sample in samples],
        captions=captions,
        bad=[("x.tar", "k", "torn")] if samples[0][1] == 0 else [],
    )


def _evaluate(group, num_images: int, batch_size: int, config: EvalConfig):
    samples, ranks, model = eval_samples(num_images), ranks_of(group), LinearTowers()
    starts = range(0, num_images, batch_size)
    mine = [start for i, start in enumerate(starts) if i % ranks.world_size == ranks.rank]
    batches = (batch_of(samples[start : start + batch_size]) for start in mine)
    results = evaluate(model, batches, tokenize, config, ranks)
    assert model.training
    return results, model.passes


BOTH_TASKS = EvalConfig(tasks=["retrieval", "zero_shot"], batch_size=4, templates=["{}", "a {}"])


def test_evaluate_equals_the_naive_protocol():
    results, _ = _evaluate(None, 41, 41, BOTH_TASKS)
    samples, model = eval_samples(41), LinearTowers().eval()
    whole = batch_of(samples)
    with torch.no_grad():
        images = model(whole.images).images
        texts = model(None, whole.texts).texts
    owners = whole.ids[whole.text_owner].tolist()
    for k in (1, 5, 10):
        expected = naive_retrieval(images, texts, whole.ids.tolist(), owners, whole.captions, k)
        found = results[f"image_to_text_R@{k}"], results[f"text_to_image_R@{k}"]
        assert found == pytest.approx(expected, abs=1e-12)
    right = [0, 0]
    names = [sorted({c for s in samples if s[2] == label for c in s[3]}) for label in range(6)]
    classes = []
    for of_class in names:
        prompts = of_class + [f"a {name}" for name in of_class]
        with torch.no_grad():
            rows = model(None, tokenize(prompts)).texts.double().numpy()
        mean = rows.mean(0)
        classes.append(mean / np.linalg.norm(mean))
    scores = images.double().numpy() @ np.array(classes).T
    labels = np.array([sample[2] for sample in samples])
    known = labels >= 0
    right = (scores[known].argmax(1) == labels[known]).mean()
    assert results["zero_shot_top1"] == pytest.approx(right, abs=1e-12)
    counts = [results[f"num_{name}"] for name in ("images", "texts", "labelled", "classes", "bad")]
    assert counts == [41, len(set(whole.captions)), known.sum(), 6, 1]


@pytest.mark.parametrize(("world_size", "num_images"), [(2, 41), (3, 41), (4, 9)])
def test_evaluate_is_the_same_at_any_world_size(world_size, num_images):
    whole, _ = _evaluate(None, num_images, 4, BOTH_TASKS)
    ranks = run_ranks(world_size, _evaluate, num_images, 4, BOTH_TASKS)
    for results, passes in ranks:
        assert results == whole
        assert passes == ranks[0][1], "ZeRO 3 needs equally many forward passes on every rank"


def test_class_names_of_a_file_widen_the_gallery(tmp_path: Path):
    path = tmp_path / "classes.tsv"
    path.write_text("cls\tname\n" + "".join(f"{i}\t{i}a{i}\n" for i in range(30)))
    config = EvalConfig(tasks=["zero_shot"], classes=str(path))
    results, _ = _evaluate(None, 41, 8, config)
    assert results["num_classes"] == 30 and results["num_labelled"] == 37
    assert "image_to_text_R@1" not in results


def test_a_set_without_samples_or_labels_is_an_error():
    with pytest.raises(ValueError, match="there is no sample to evaluate"):
        evaluate(LinearTowers(), [], tokenize, EvalConfig(), Ranks())
    batch = batch_of([(torch.zeros(3, 4, 4, dtype=torch.uint8), 1, -1, ["a"])])
    with pytest.raises(ConfigError, match="zero_shot needs labels, and no sample has one"):
        evaluate(LinearTowers(), [batch], tokenize, EvalConfig(tasks=["zero_shot"]), Ranks())
