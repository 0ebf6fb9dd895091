"""The `[centers]` section; the other sections are in `trainer/sections.py`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data.config import Section


class CentersConfig(Section):
    """Class centers, in parts over the ranks, and their optimizer."""

    num_classes: int = Field(default=0, ge=0)
    """Identities; 0: the largest label of the training data plus one."""
    quarter_turns: bool = False
    """Images are turned by 0, 90, 180 or 270 degrees, and a class turned is another class: four of
    each. For written characters (Santoro et al. 2016, arXiv 1605.06065)."""
    sample_rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the centers that take part in a step; those of the batch's identities always do."""
    correction: bool = True
    """Weigh sampled negatives by how many they stand for, so that the rate does not move the loss;
    published recipes do without."""
    hard_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the sampled negatives taken from the nearest centers of the batch's identities."""
    hard_neighbours: int = Field(default=16, ge=1)
    """Length of each identity's list of nearest centers."""
    hard_every: int = Field(default=1000, ge=1)
    """Steps between refreshes of those lists."""
    subcenters: int = Field(default=1, ge=1)
    """Centers of an identity; the best one counts (sub-center ArcFace)."""
    init_std: float = Field(default=0.01, gt=0)
    """Centers start from a normal distribution of this deviation."""
    init: str = ""
    """A run, a checkpoint, or a folder of `nsphere centers`, whose centers are taken over by
    identity name; others start anew."""
    identities: str = ""
    """TSV with columns cls and name; empty: identities.tsv beside the shards, and without one an
    identity is called by its number."""
    optimizer: Literal["sgd", "adamw", "adagrad"] = "sgd"
    """adagrad: row-wise, one number a center."""
    mode: Literal["lazy", "exact"] = "exact"
    """exact: what an untouched center missed is applied when it is next touched, as a dense
    optimizer would have; lazy: a center moves only when it is touched, so that its momentum comes
    late and the sample rate moves the loss."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Learning rate of the centers, relative to `optim.lr`."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    """sgd: coupled, as published; adamw and adagrad: decoupled."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored centers; bfloat16 is rounded stochastically."""
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the optimizer's rows."""
    host: bool = False
    """Keep centers and their optimizer in host memory."""
    norm_bounds: tuple[float, float] = (1e-3, 1e3)
    """Lengths within which a touched center is kept; [0, inf]: any."""

    @model_validator(mode="after")
    def _optimizer_is_possible(self) -> Self:
        least, most = self.norm_bounds
        if not 0 <= least <= most or most == 0:
            raise ValueError(f"norm_bounds = [{least}, {most}]: a least length, then the greatest")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: each in [0, 1)")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead along the momentum: set momentum above 0")
        if self.quarter_turns and (self.identities or self.init):
            raise ValueError("quarter_turns makes classes without names: no identities, no init")
        return self

    @property
    def classes_per_label(self) -> int:
        """Classes that a label of the data stands for."""
        return 4 if self.quarter_turns else 1
