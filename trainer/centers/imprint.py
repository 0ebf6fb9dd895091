"""Centers for identities that a run has not seen, from their images.

Weight imprinting (Qi et al. 2018, arXiv 1712.07136): the mean of the unit embeddings of an
identity's images, a unit vector again, is a center that classifies them before any training.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from data.augment import ImageTransform
from data.errors import DataError
from data.identities import largest_label
from data.index import Index
from data.loader import iter_eval_batches
from trainer.centers.centers import draw_rows
from trainer.centers.files import StoredCenters
from trainer.centers.identities import Int64s, NameTable
from trainer.centers.lengths import measure_lengths
from trainer.config import Config, ConfigError
from trainer.models.faces import FaceModel
from trainer.precision import autocast_dtype

Progress = Callable[[int, int], None]


class NewIdentities(NamedTuple):
    """Identities of an index that a table of centers does not have."""

    names: list[str]
    samples: Int64s  # (n,) ids in the index, rising
    places: Int64s  # (n,) which of the names each has


def find_new(index: Index, labels: NameTable, known: NameTable, origin: str) -> NewIdentities:
    """The identities whose name is not known, by rising label, and their samples.

    Raises ConfigError for a label without a name, and where there are none, DataError for a sample
    without a label.
    """
    largest_label(index)  # each sample has one
    column = np.concatenate([np.zeros(0, np.int64), *index.iter_column("label")])
    present = np.unique(column)
    nameless = present[~np.isin(present, labels.numbers)]
    if len(nameless):
        (entry,) = index.entries(np.flatnonzero(column == nameless[0])[:1])
        raise ConfigError(
            f"{entry.name} has the label {nameless[0]}, which {origin} does not name: add a line"
        )
    by_label = np.argsort(labels.numbers)
    order = by_label[np.searchsorted(labels.numbers, present, sorter=by_label)]
    names = labels.names.take(pa.array(order))
    unknown = known.find(names) < 0
    if not unknown.any():
        raise ConfigError(
            f"{origin}: all {len(present):,} identities of the shards are known already: there is "
            "nothing to add"
        )
    places = np.searchsorted(present[unknown], column)
    places[places == unknown.sum()] = 0
    samples = np.flatnonzero(present[unknown][places] == column)
    return NewIdentities(names.filter(pa.array(unknown)).to_pylist(), samples, places[samples])


def imprint(
    model: FaceModel,  # in evaluation mode
    index: Index,
    new: NewIdentities,
    config: Config,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:  # (m, d) float64 unit rows
    """The mean direction of each new identity's images. Raises DataError for one with none."""
    device = torch.device(device)
    sums = torch.zeros(len(new.names), model.embed_dim, dtype=torch.float64, device=device)
    counts = np.zeros(len(new.names), np.int64)
    for done, (ids, images) in enumerate(_iter_images(model, index, new.samples, config), start=1):
        places = new.places[np.searchsorted(new.samples, ids)]
        np.add.at(counts, places, 1)
        units = normalize(_embed(model, images.to(device), config).double(), dim=1)
        sums.index_add_(0, torch.from_numpy(places).to(device), units)
        if progress is not None:
            progress(min(done * config.eval.batch_size, len(new.samples)), len(new.samples))
    if not counts.all():
        raise DataError(
            f"{new.names[int(counts.argmin())]!r} has no image that can be read: leave its samples "
            "out, or take --start random"
        )
    return normalize(sums, dim=1).cpu()


def start_centers(
    stored: StoredCenters, config: Config, count: int, directions: Tensor | None
) -> Tensor:  # (count, subcenters, d) float64
    """Centers after those that are stored: along `directions` (count, d), or as drawn at a start.

    A direction gets the mean length of the stored centers, so that it moves at their pace. Of
    several sub-centers the first is the direction's, and the others are drawn.
    """
    sub = stored.subcenters
    std, seed = config.centers.init_std, config.train.seed
    rows = draw_rows(stored.num_classes * sub, count * sub, stored.dim, std, seed)
    drawn = torch.cat([block for _, block in rows])
    centers = drawn.double().unflatten(0, (-1, sub))
    if directions is not None:
        centers[:, 0] = directions * measure_lengths(stored).mean
    return centers


def _iter_images(
    model: FaceModel, index: Index, samples: Int64s, config: Config
) -> Iterator[tuple[Int64s, Tensor]]:
    batches = iter_eval_batches(
        index,
        config.data,
        image_transform=ImageTransform(model.image_size, None, resize_mode=model.resize_mode),
        tokenizer_spec=model.tokenizer_spec,
        batch_size=config.eval.batch_size,
        rank=0,
        world_size=1,
        ids=samples,
    )
    for batch in batches:
        if len(batch.ids):
            yield batch.ids.numpy(), batch.images


def _embed(model: FaceModel, images: Tensor, config: Config) -> Tensor:
    dtype = autocast_dtype(config.train.precision, images.device)
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return model(images).rows.float()
