"""The metrics on the real sets give the baselines that stand in their READMEs."""

import pytest
import torch
from torch import Tensor, nn

from trainer.config import parse_config
from trainer.models.faces import FaceEmbeddings
from trainer.ranks import Ranks
from trainer.validate import Validation

LUMA = (0.299, 0.587, 0.114)
SETS = {
    # set: pixels of a file, of a row, tasks
    "lfw-aligned": ((112, 112), 32, ["recall", "verification"]),
    "omniglot": ((105, 105), 28, ["recall"]),
    "orl-faces": ((112, 92), 32, ["recall"]),
}
BASELINES = {
    "lfw-aligned": {"verification_AUC": 0.653, "recall_R@1": 0.179},
    "omniglot": {"recall_R@1": 0.318},
    "orl-faces": {"recall_R@1": 1.0},
}


class Pixels(nn.Module):
    """Grey pixels, averaged over boxes as Pillow's BOX filter has them, less their mean."""

    resize_mode = "squash"
    tokenizer_spec = None

    def __init__(self, image_size: tuple[int, int], size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.rows, self.columns = (self._boxes(length, size) for length in image_size)

    @staticmethod
    def _boxes(length: int, size: int) -> Tensor:  # (size, length)
        centers = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * length / size
        inside = (torch.arange(length) + 0.5 - centers) / (length / size)
        weights = ((inside > -0.5) & (inside <= 0.5)).double()
        return weights / weights.sum(dim=1, keepdim=True)

    def forward(self, images: Tensor) -> FaceEmbeddings:
        grey = (images.double() * torch.tensor(LUMA)[:, None, None]).sum(dim=1).round()
        pixels = ((grey @ self.columns.T).round().transpose(1, 2) @ self.rows.T).round().flatten(1)
        return FaceEmbeddings((pixels - pixels.mean(dim=1, keepdim=True)).float())


@pytest.mark.parametrize("name", SETS)
def test_cosines_of_pixels_give_the_published_baseline(name, real_dataset, tmp_path, monkeypatch):
    folder = real_dataset(name)
    monkeypatch.setenv("NSPHERE_CACHE", str(tmp_path))
    image_size, size, tasks = SETS[name]
    tree = {
        "data": {"val_shards": str(folder / "val-*.tar*"), "workers": 0},
        "loss": {"name": "arcface"},
        "train": {"precision": "fp32"},
        "eval": {"tasks": tasks, "pairs": str(folder / "val_pairs.tsv")},
    }
    config, model = parse_config(tree, name), Pixels(image_size, size)
    results = Validation.build(config, model, Ranks(), config.data.val_shards)(model)
    for number, expected in BASELINES[name].items():
        # Pillow rounds a few pixels otherwise, which turns an image or two.
        assert results[number] == pytest.approx(expected, abs=3e-3), number
    assert results["num_bad"] == 0
    if "verification" in tasks:
        assert results["verification_folds_by_kind"] == 1, "the table is sorted by kind"
        assert 0.58 < results["verification_accuracy"] < 0.63
