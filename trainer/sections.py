"""The sections of a run's configuration as frozen typed models; `trainer/config.py` reads them.

Every field says what it means in the words that `nsphere config` and its errors use.
"""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from data.config import DataConfig, NegativesConfig, Section
from trainer.centers_section import CentersConfig
from trainer.duration import Duration
from trainer.eval_section import EvalConfig, Task
from trainer.model_section import ModelConfig

CenterLoss = Literal[
    "softmax",
    "cosface",
    "arcface",
    "combined",
    "sphereface",
    "elastic_arcface",
    "elastic_cosface",
    "elastic_arcface_plus",
    "elastic_cosface_plus",
    "adaface",
    "magface",
    "curricularface",
    "sface",
]
CENTER_LOSSES: tuple[str, ...] = get_args(CenterLoss)
"""Losses against class centers: they train one backbone on labelled images."""
LabelLoss = Literal["info_nce", "decoupled", "soft_topk", "topk_hinge", "one_vs_all"]
LABEL_LOSSES: tuple[str, ...] = get_args(LabelLoss)
"""Losses between texts and their labels, of which each may have several."""


class LossConfig(Section):
    """The loss and its own options."""

    name: Literal["clip", "siglip", CenterLoss, LabelLoss] = "clip"
    """clip: symmetric InfoNCE; siglip: pairwise sigmoid; info_nce, decoupled, soft_topk, topk_hinge
    and one_vs_all: texts against labels (`[labels]`); the others: against class centers."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all pairs (clip only)."""
    mask_equal_ids: bool = True
    """The same sample twice in a global batch is not its own negative."""
    mask_equal_captions: bool = False
    """Samples with an equal caption in a global batch are not each other's negatives."""
    visiting: Literal["gather", "ring"] = "gather"
    """How texts visit the ranks: all at once, or one neighbour's at a time (less memory)."""
    scale: float = Field(default=64.0, gt=0)
    """Class centers: multiplier of the cosines."""
    margin: float | None = None
    """Class centers: the loss's margin (mean margin for elastic losses); topk_hinge: its margin;
    None: as published."""
    margins: tuple[float, float, float] = (1.0, 0.3, 0.2)
    """combined: m1, m2, m3 of cos(m1 theta + m2) - m3."""
    margin_std: float | None = None
    """elastic losses: standard deviation of the margin; None: as published."""
    sphereface_annealing: tuple[float, float, float] = (0.0, 0.12, 5.0)
    """sphereface: start, rate and floor of lambda = max(floor, start / (1 + rate * step)), the
    weight of the plain cosine beside the margined one; start 0: none. Published for margin 4:
    (1000, 0.12, 5)."""
    gradient: Literal["analytic", "detached"] = "analytic"
    """Slope of the margined target: of the loss as written, or 1 (straight through)."""
    beyond_pi: Literal["monotonic", "none", "easy"] | None = None
    """Where the target's angle and margin pass pi: go on falling, turn back as written, or take the
    margin only where the cosine is positive; None: as published, easy for magface, else falling."""
    topk: int = Field(default=0, ge=0)
    """topk_hinge: hardest negatives that count, 0: 10; soft_topk: labels to be ranked first, 0: as
    many as the query has."""
    topk_alpha: float = Field(default=2.0, gt=0)
    """soft_topk: steepness of the sigmoid."""
    topk_temperature: float = Field(default=0.0, ge=0)
    """topk_hinge: weigh violating negatives by a softmax of this temperature; 0: all alike."""
    filter: Literal["none", "drop", "zero"] = "none"
    """Negatives above `filter_threshold` (likely the same person): kept, left out, or logit 0."""
    filter_threshold: float = Field(default=0.4, ge=-1, le=1)
    """Cosine above which a negative is filtered."""
    adaface_h: float = Field(default=0.333, gt=0)
    """adaface: concentration of the norms' statistic."""
    adaface_momentum: float = Field(default=0.01, gt=0, le=1)
    """adaface: share of a batch in the running mean and deviation of the norms."""
    magface_norms: tuple[float, float] = (10.0, 110.0)
    """magface: range of norms over which the margin rises."""
    magface_margins: tuple[float, float] = (0.45, 0.8)
    """magface: margins at both ends of the range."""
    magface_weight: float = Field(default=35.0, ge=0)
    """magface: weight of the norms' regulariser."""
    curricular_momentum: float = Field(default=0.01, gt=0, le=1)
    """curricularface: share of a batch in the running mean target cosine t."""
    sface: tuple[float, float, float] = (80.0, 0.8, 1.23)
    """sface: steepness k, and the angles a and b (radians) of the two sigmoids."""


class LabelsConfig(Section):
    """The labels of texts: what a label's row is, and which of them take part in a step."""

    table: str = ""
    """Parquet with columns label, text and train_count; empty: labels.parquet beside the shards."""
    rows: Literal["texts", "classifiers"] = "texts"
    """texts: a tower embeds the label's text; classifiers: a row of its own for each label, in
    parts over the ranks, moved by the optimizer of `[centers]`."""
    over: Literal["batch", "all"] = "batch"
    """Negatives of a query: labels of the global batch's queries, or all there are."""
    init: str = ""
    """classifiers: a run whose label embeddings they start from; empty: drawn."""
    filter: str = ""
    """Pairs (query, label) left out of evaluation; empty: filter_labels_test.txt beside the
    evaluated shards, if there is one."""
    propensity: tuple[float, float] = (0.55, 1.5)
    """A and B of a label's inverse propensity: 0.5, 0.4 Wikipedia; 0.6, 2.6 Amazon."""
    top: int = Field(default=100, ge=1)
    """Labels predicted for a query in evaluation."""


class OptimConfig(Section):
    """Optimizer of the towers."""

    name: Literal["adamw", "sgd", "lamb", "muon"] = "adamw"
    """sgd: with `momentum`, decay coupled to the gradient."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    image_lr: float = Field(default=0.0, ge=0)
    """Peak learning rate of the image tower; 0: `lr`."""
    text_lr: float = Field(default=0.0, ge=0)
    """Peak learning rate of the text tower; 0: `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd only."""
    nesterov: bool = False
    """sgd only."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decay of what `decay_set` names, never of scale and bias: decoupled, but for sgd coupled."""
    decay_set: Literal["open_clip", "big_vision", "ndim", "all"] = "open_clip"
    """What decays: by open_clip's published rule, big_vision's kernels only, ndim >= 2, or all
    parameters of the towers (insightface), gains and biases included."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate factor per layer, counted from the output; 1: none."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: never."""


class ScheduleConfig(Section):
    """Learning rate as a pure function of samples seen."""

    name: Literal["cosine", "constant", "wsd", "rsqrt", "polynomial"] = "cosine"
    warmup: Duration = Duration("0 steps")
    """Linear warm-up from 0."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    cooldown: Duration = Duration("0 steps")
    """wsd, rsqrt: length of the linear decay to the floor at the end."""
    power: float = Field(default=1.0, gt=0)
    """polynomial: exponent of the share of the run that is left; 1: linear."""

    @model_validator(mode="after")
    def _durations_are_there(self) -> Self:
        if "minutes" in (self.warmup.unit, self.cooldown.unit):
            raise ValueError("schedule durations are in steps, samples or epochs, not minutes")
        if self.name == "wsd" and not self.cooldown.value:
            raise ValueError('schedule.name = "wsd" decays at the end: set schedule.cooldown')
        if self.name == "rsqrt" and not self.warmup.value:
            raise ValueError('schedule.name = "rsqrt" decays by its warm-up: set schedule.warmup')
        return self


class ZeroConfig(Section):
    """What DeepSpeed shards over the ranks."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: nothing, 1: optimizer state, 2: and gradients, 3: and parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Stage 3 only."""
    nvme_path: str = ""
    """Folder for `nvme` offload."""


class TrainConfig(Section):
    """Length, batch, precision and seed of the run."""

    duration: Duration = Duration("1 epochs")
    global_batch_size: int = Field(default=256, ge=2)
    """Samples of one step over all ranks: the same samples at any world size."""
    chunk_size: int = Field(default=0, ge=0)
    """Samples of a rank that pass the towers at once (cached embedding gradients); 0: all."""
    seed: int = 0
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """bf16: autocast over float32 parameters, but not on a CPU that would have to emulate it; fp16:
    DeepSpeed's loss scaling, GPU only."""
    tf32: bool = True
    """Allow TF32 matrix products on NVIDIA GPUs where float32 is asked for."""
    max_skipped: int = Field(default=10, ge=0)
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the exponential moving average of the weights; 0: none kept."""
    deterministic: bool = False
    """Deterministic GPU kernels: resume is then bit-identical on GPUs too."""


class CheckpointConfig(Section):
    """When the run is saved and what is kept."""

    every: Duration = Duration("1000 steps")
    """Steps, samples, epochs or minutes between saves; SIGTERM, SIGUSR1 and the end save too."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: Duration | None = None
    """Checkpoints at multiples of this are kept for ever."""
    background: bool = False
    """Write while training goes on; the step waits only for the copy into host memory."""
    max_refused: int = Field(default=3, ge=0)
    """Saves in a row that the disk may refuse, with a warning each, before the run ends; the last
    save of a run must succeed."""
    remote: str = ""
    """Folder of a remote store (fsspec URL, s3://bucket/run) that whole checkpoints are copied to,
    and fetched from where the run folder has none."""


class LaunchConfig(Section):
    """How long ranks wait for each other, and what happens when one is lost."""

    timeout: float = Field(default=300.0, gt=0)
    """Seconds without progress after which a silent rank is given up: every other rank writes its
    stack and last collective to its log, and leaves."""
    start_timeout: float = Field(default=1800.0, gt=0)
    """The same until the first step: the first rank indexes shards while the others wait."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts from the last checkpoint, without progress between them, before the job fails."""


class SpikesConfig(Section):
    """Going back from a loss that jumps (`trainer/spikes.py`)."""

    threshold: float = Field(default=0.0, ge=0)
    """Typical deviations above the recent losses' median that make a spike; 0: never looked for.
    About 10 is beyond the noise of training."""
    window: int = Field(default=64, ge=4)
    """Steps whose losses are the recent ones; until there are so many, nothing is a spike."""
    skip: int = Field(default=8, ge=1)
    """Batches passed over after going back: the spike's own and those right before it."""
    max_rollbacks: int = Field(default=5, ge=1)
    """Times that a start of the run may go back before it gives up."""


class LogConfig(Section):
    """Numbers for people."""

    every: Duration = Duration("10 steps")
    samples: bool = False
    """Write samples/step-*.json: the sample keys of every global batch, in order."""
    straggler_window: float = Field(default=60.0, gt=0)
    """Seconds over which ranks are compared before one that holds the others up is named."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Experiment trackers, through accelerate."""


class Config(Section):
    """One run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    centers: CentersConfig = CentersConfig()
    labels: LabelsConfig = LabelsConfig()
    negatives: NegativesConfig = NegativesConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()
    spikes: SpikesConfig = SpikesConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def has_centers(self) -> bool:
        """True for one backbone against class centers, False for image and text towers."""
        return self.loss.name in CENTER_LOSSES

    @property
    def has_labels(self) -> bool:
        """True for texts against labels."""
        return self.loss.name in LABEL_LOSSES

    @property
    def eval_tasks(self) -> tuple[Task, ...]:
        """`eval.tasks`; where none is named, what such a model is judged by."""
        if self.eval.tasks:
            return self.eval.tasks
        if self.has_labels:
            return ("xmc",)
        if not self.has_centers:
            return ("retrieval",)
        return ("recall", "verification") if self.eval.pairs else ("recall",)

    def _beside_plans(self) -> dict[str, bool]:
        """Problem -> whether it is there, of what plans carry beside their order."""
        asked, planner = self.negatives.explicit, self.negatives.planner
        embeds_batch = self.labels.rows == "texts" and self.labels.over == "batch"
        planned = self.data.batching == "planned" and planner != "random"
        text = f"negatives.explicit = {asked}: "
        return {
            f"{text}it is for texts against labels, and loss.name = {self.loss.name!r} is none of"
            ' these: leave it out and take hard batches alone (negatives.planner = "tree")': (
                asked > 0 and not self.has_labels
            ),
            f'{text}it is for labels.rows = "texts" with labels.over = "batch", where labels are'
            " embedded in the step; classifiers and all labels are met without it: leave it out": (
                asked > 0 and self.has_labels and not embeds_batch
            ),
            f"{text}hard negatives are found by plans of embeddings: set data.batching ="
            ' "planned", and a negatives.planner other than "random"': (
                asked > 0 and self.has_labels and embeds_batch and not planned
            ),
            f"negatives.weights: the losses of texts against labels are weighted, and loss.name ="
            f" {self.loss.name!r} is none of these: leave it out": (
                bool(self.negatives.weights) and not self.has_labels
            ),
            'negatives.weights lie in plans: set data.batching = "planned", and a negatives.planner'
            ' other than "random"': (
                bool(self.negatives.weights) and self.has_labels and not planned
            ),
            'negatives.margins are what negatives.planner = "topics" balances batches over: set it,'
            ' with data.batching = "planned"': (
                bool(self.negatives.margins) and not (planned and planner == "topics")
            ),
        }

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        nvme = "nvme" in (self.zero.offload_param, self.zero.offload_optimizer)
        problems = {
            "train.duration is in steps, samples or epochs, not minutes": (
                self.train.duration.unit == "minutes"
            ),
            "zero.offload_param needs zero.stage = 3": (
                self.zero.offload_param != "none" and self.zero.stage != 3
            ),
            "zero.offload_optimizer needs zero.stage >= 1": (
                self.zero.offload_optimizer != "none" and self.zero.stage == 0
            ),
            "nvme offload needs zero.nvme_path": nvme and not self.zero.nvme_path,
            'loss.label_smoothing needs loss.name = "clip"': (
                self.loss.name != "clip" and self.loss.label_smoothing > 0
            ),
            "train.precision = 'fp16' needs zero.stage >= 1": (
                self.train.precision == "fp16" and self.zero.stage == 0
            ),
            f'optim.name = "{self.optim.name}" works on whole matrices, which ZeRO cuts up:'
            " set zero.stage = 0": self.optim.name in ("lamb", "muon") and self.zero.stage != 0,
            'spikes.threshold: no way back leads through data.batching = "planned" yet': (
                self.spikes.threshold > 0 and self.data.batching == "planned"
            ),
        }
        problems |= self._beside_plans()
        if any(problems.values()):
            raise ValueError("; ".join(text for text, there in problems.items() if there))
        return self
