"""The `[data]` section as frozen typed models; the whole configuration is `trainer/config.py`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Remainder = Literal["drop", "share"]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SourceConfig(Section):
    """One of several data sets that are mixed by weight: a `[[data.sources]]` table."""

    shards: str | list[str]
    """Tar shards: a path or URL, braces `x-{000..007}.tar`, `a::b`, or a list of these."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples of a global batch, relative to the other sources' weights."""


class AugmentConfig(Section):
    """Training augmentation; every draw is keyed by (seed, epoch, sample id), never by rank.

    AdaFace's set (arXiv 2204.00964): erase_outside, low_resolution and color_jitter_probability of
    0.2, color_jitter = [0.5, 0.5, 0.5, 0], flip = 0.5, crop = false.
    """

    crop: bool = True
    """Random resized crop by `scale` and `ratio`; false: the geometry of evaluation, as aligned
    faces want."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random resized crop, as a share of the image's."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Aspect ratio (width / height) of the crop."""
    shift: float = Field(default=0.0, ge=0, lt=1)
    """Largest shift as a share of the side, drawn uniformly in both directions; edges repeat."""
    zoom: float = Field(default=0.0, ge=0, le=1)
    """Largest change of size: 0.1 draws factors from 1/1.1 to 1.1, log-uniformly; edges repeat."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Rotation in degrees, drawn uniformly from [-rotate, rotate]."""
    erase_outside: float = Field(default=0.0, ge=0, le=1)
    """Probability that all outside a random box becomes black; the box stays in its place
    (AdaFace's crop)."""
    erase_outside_scale: tuple[float, float] = (0.2, 1.0)
    """Area of that box, as a share of the image's; its aspect ratio is from 3/4 to 4/3."""
    low_resolution: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is made small and large again, by two interpolations drawn from
    nearest, bilinear and bicubic, with and without antialias."""
    low_resolution_scale: tuple[float, float] = (0.2, 1.0)
    """Side of the small image, as a share of the image's."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation, hue (torchvision's meaning)."""
    color_jitter_probability: float = Field(default=0.8, ge=0, le=1)
    """Probability that the color jitter is applied to an image."""
    grayscale: float = Field(default=0.0, ge=0, le=1)
    """Probability of a conversion to grey."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of a Gaussian blur; sigma from [0.1, 2] pixels at 224, scaled to the size."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a random rectangle (2-20 % of the area) is replaced by its mean color."""

    @model_validator(mode="after")
    def _shares_are_ranges(self) -> "AugmentConfig":
        for name in ("scale", "erase_outside_scale", "low_resolution_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} = [{low:g}, {high:g}] is no range of shares in (0, 1]")
        return self


class DataConfig(Section):
    """Where samples come from, how they are ordered, read and decoded."""

    shards: str | list[str] = ""
    """Training shards, as `SourceConfig.shards`; or give `sources`."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources mixed by weight, in closed form; instead of `shards`."""
    val_shards: str | list[str] = ""
    """Shards of the evaluation during training; empty: none."""
    image_key: str = "jpg;jpeg;png;webp"
    """File endings of the image member, first found wins."""
    caption_key: str = "txt"
    """Ending of the caption member, or `json:NAME` for a field (a string or a list) of the JSON."""
    label_key: str = "cls"
    """Ending of an integer class label, if there is one."""
    workers: int = Field(default=2, ge=0)
    """Worker processes per rank; 0 reads in the training process."""
    prefetch: int = Field(default=4, ge=1)
    """Batches read ahead by each worker."""
    chunk: int = Field(default=64, ge=1)
    """Consecutive samples of a shard that are read and shuffled together."""
    lanes: int = Field(default=64, ge=1)
    """Equal parts of the chunk sequence that feed a global batch in turn."""
    window: int = Field(default=64, ge=1)
    """Chunks of a lane whose samples are permuted together."""
    read_ahead: int = Field(default=1024, ge=0)
    """Planned batches lie all over the shards: samples of a rank that the system, or the node's
    cache, is asked for before a worker reads them; 0: none."""
    batching: Literal["plain", "identities", "planned"] = "plain"
    """plain: samples in a shuffled order; identities: each global batch is
    global_batch_size / images_per_identity identities with `images_per_identity` images each;
    planned: batches made of each other's hard negatives (`[negatives]`)."""
    images_per_identity: int = Field(default=4, ge=1)
    """Images of an identity in a global batch, with batching = "identities"."""
    remainder: Remainder = "drop"
    """Images beyond an identity's last group of `images_per_identity`, and identities with fewer.
    drop: they rest, other images each epoch; small identities never come. share: they fill groups
    together, several identities in one."""
    cache_dir: Path | None = None
    """Node cache for remote shards; none: pieces are not kept."""
    cache_bytes: int = Field(default=100 * 2**30, ge=0)
    """Size of the node cache in bytes; the least recently used pieces go first."""
    max_pixels: int = Field(default=25_000_000, ge=1)
    """Images with more pixels are bad samples (decompression bombs)."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """The run stops when more than this share of the samples read was bad."""
    normalize_captions: bool = False
    """Strip and lower-case captions before they are compared and tokenized."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _one_way_to_name_shards(self) -> "DataConfig":
        if self.shards and self.sources:
            raise ValueError("give either data.shards or [[data.sources]] tables, not both")
        return self

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The training sources, a plain `shards` being the one-source case."""
        return self.sources or ((SourceConfig(shards=self.shards),) if self.shards else ())


class NegativesConfig(Section):
    """Planned batches (`data.batching = "planned"`): who meets, and when plans are renewed."""

    planner: Literal["random", "tree", "greedy", "topics", "coordinates", "identities"] = "tree"
    """random: the baseline; tree: NGAME's balanced 2-means; greedy: a sample's nearest neighbours
    and random ones (Sample4Geo); topics: one cluster a batch, balanced over margin bins
    (TAS-Balanced); coordinates: near in `coordinates` at first, then greedy; identities: P x K
    images of near identities."""
    side: Literal["auto", "images", "texts"] = "auto"
    """Embeddings that samples are clustered by; auto: texts, or images where there are none."""
    cluster_size: int = Field(default=4, ge=1)
    """Samples of a cluster; clusters are shuffled and laid into batches. 1: random. topics: of a
    topic (four batches, where that is no more than one); identities: identities of a cluster, each
    with its K images."""
    grow_at: tuple[int, ...] = ()
    """Epochs at which the cluster size doubles (NGAME's schedule)."""
    start_epoch: int = Field(default=1, ge=0)
    """First epoch that is planned by embeddings; random before."""
    refresh: str = "1 epochs"
    """How often a new plan is made: epochs, or steps, which switch inside an epoch."""
    lead: str = "0.1 epochs"
    """How long before its first batch a plan is asked for: the time there is to make it. Its
    embeddings are that much older."""
    refresh_pass: bool = False
    """Embed every sample anew for each plan; false: take what training steps wrote."""
    strict: bool = True
    """Training waits for a plan that is late; false: it goes on with the old one and the step of
    the switch is recorded."""
    random_share: float = Field(default=0.0, ge=0, le=1)
    """Share of a batch that is drawn at random."""
    skip_nearest: int = Field(default=0, ge=0)
    """greedy, explicit: nearest neighbours that are passed over, as they may be unlabelled
    positives."""
    neighbours: int = Field(default=32, ge=1)
    """greedy: neighbours that a sample brings along, half of them nearest, half drawn."""
    explicit: int = Field(default=0, ge=0)
    """Texts against labels of the batch: hard negatives that a sample brings along, the nearest
    samples that share no label with it; one label of each joins those of the step."""
    unique: tuple[Literal["label", "caption"], ...] = ()
    """What no two samples of a batch may share; of lists of labels, any label."""
    dim: int = Field(default=64, ge=1)
    """Columns of the stored embeddings; wider ones are projected at random, by the seed."""
    coordinates: str = ""
    """coordinates: Parquet with key and numeric columns (latitude, longitude in degrees)."""
    margins: str = ""
    """topics: Parquet with key and margin, a teacher's positive less hardest negative; empty: how
    far a sample lies from its topic's mean."""
    margin_bins: int = Field(default=10, ge=1)
    """topics: equal-width bins of the hardness margin that a batch is balanced over."""
    weights: str = ""
    """Texts against labels: Parquet with key and weight, what samples' losses are multiplied by
    from the first plan on, scaled to a mean of 1 over all samples; one not named has 1 before."""
    locality: int = Field(default=0, ge=0)
    """Cluster inside groups of so many shards, so that a batch touches few; 0: everywhere."""
    controller: bool = False
    """Halve or double `cluster_size` at a plan to keep hardness within `band`; recorded."""
    band: tuple[float, float] = (0.02, 0.2)
    """Share of sampled rows whose hardest negative comes closer than the positive."""
