"""The `[eval]` section; the other sections are in `trainer/sections.py`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data.config import Section
from trainer.duration import Duration

Task = Literal[
    "retrieval", "zero_shot", "recall", "verification", "identification", "all_pairs", "ijb", "xmc"
]


class HnswConfig(Section):
    """Graph of labels for approximate search (Malkov and Yashunin 2016, arXiv 1603.09320)."""

    m: int = Field(default=32, ge=2)
    """Links of a label in each layer, twice as many in the lowest."""
    ef_construction: int = Field(default=200, ge=1)
    """Candidates while the graph is built."""
    ef_search: int = Field(default=200, ge=1)
    """Candidates while it is searched; at least `labels.top` and what filters take away."""
    sample: int = Field(default=1000, ge=1)
    """About so many queries are answered exactly too, for the recall that is told."""


class NeighboursConfig(Section):
    """Votes of a query's nearest training texts (RAE-XMC, Wang et al. 2025, arXiv 2502.10615)."""

    count: int = Field(default=0, ge=0)
    """Training texts that vote for their labels; 0: none. Reads `data.shards`."""
    temperature: float = Field(default=0.04, gt=0)
    """Of the softmax over the cosines of texts, and over those of labels."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the votes in a label's score."""


class EvalConfig(Section):
    """Evaluation of `data.val_shards` while training and in `nsphere eval`."""

    every: Duration | None = None
    """None: only at the end, if there are val shards."""
    tasks: tuple[Task, ...] = ()
    """Empty: what suits the run, `Config.eval_tasks`."""
    batch_size: int = Field(default=256, ge=1)
    """Samples a rank embeds at once."""
    templates: tuple[str, ...] = ("{}",)
    """Zero-shot prompts, `{}` standing for the class name; `openai` is open_clip's list of 80."""
    classes: str = ""
    """Zero-shot class names: a text file (a line each), a TSV with columns cls and name or label,
    or `imagenet`; empty: the distinct captions of each label in the evaluated shards."""
    flip: bool = False
    """Add the embedding of the mirror image to each image's, as published face figures do."""
    quarter_turns: bool = False
    """Embed an image in its four quarter turns, unit rows one after the other, so that a cosine is
    the mean over them: for models trained with `centers.quarter_turns`."""
    pairs: str = ""
    """Verification: a table of pairs of the evaluated shards' keys (key_a, key_b, same; no header;
    or LFW's own). A `.bin` file among the shards brings its own pairs."""
    gallery: str = ""
    """Identification: a table key, role (gallery, probe) and perhaps identity; empty: the first
    image of each label enrols, all others search."""
    non_mated: float = Field(default=0.2, ge=0, lt=1)
    """Without a gallery table: share of labels, drawn by (seed, label), that enrol no image."""
    ijb: str = ""
    """Folder of IJB-B's or IJB-C's tables, or the beginning of their names (meta/ijbc)."""
    ijb_norm: bool = True
    """N1: an image counts by the length of its embedding; false, N0: all alike."""
    ijb_score: bool = True
    """D1: an image counts by the face detector's score; false, D0: all alike."""
    bootstrap: int = Field(default=200, ge=0)
    """Replicates behind the interval of IJB's figures; 0: none."""
    fars: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """False accept rates at which true accept rates are told."""
    fpirs: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """False positive identification rates at which misses are told."""
    index: Literal["exact", "hnsw"] = "exact"
    """xmc: score every label, or walk a graph of them (`[eval.hnsw]`) whose recall is told."""
    hnsw: HnswConfig = HnswConfig()
    neighbours: NeighboursConfig = NeighboursConfig()
    predictions: str = ""
    """xmc: Parquet file for the predictions (key, labels, scores); empty: none."""
    roc: str = ""
    """File for the curves (TSV: curve, far, tar, bound); empty: none."""
    seed: int = Field(default=0, ge=0)
    """Key of the draws of `non_mated` and `bootstrap`."""

    @model_validator(mode="after")
    def _rates_are_shares(self) -> Self:
        for name in ("fars", "fpirs"):
            if not all(0 <= rate <= 1 for rate in getattr(self, name)):
                raise ValueError(f"eval.{name} = {list(getattr(self, name))}: rates lie in [0, 1]")
        return self
