"""The whole configuration as frozen typed models: TOML and `--section.key=value` in, TOML out.

A key that does not exist is an error with the nearest ones that do, and all errors are reported
at once. The resolved configuration is written into the run folder and is itself a valid input.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from data.config import DataConfig, Section
from trainer.duration import Duration


class ConfigError(ValueError):
    """The configuration is wrong; the text names every key that is, and what to do."""


class ModelConfig(Section):
    """Both towers: an open_clip architecture, its start weights, what is frozen."""

    name: str = "ViT-B-32"
    """An open_clip model name, or the path of an open_clip JSON config."""
    pretrained: str = ""
    """Start weights: a local checkpoint, an open_clip tag, or `hf-hub:...`; empty: from scratch."""
    init: Literal["open_clip", "big_vision", "positional"] = "open_clip"
    """Initialisation of the towers; positional: open_clip's, but each head of a ResNet's attention
    pooling starts at one position, which keeps the layout of aligned images."""
    init_scale: float = Field(default=0.0, ge=0)
    """Start of the cosines' multiplier; 0: the loss's published value (1/0.07, SigLIP 10)."""
    init_bias: float = -10.0
    """Start of SigLIP's additive bias."""
    max_scale: float = Field(default=100.0, ge=1)
    """The scale is clamped to [1, max_scale] after each step; `inf` leaves it free (big_vision)."""
    lock_image: bool = False
    """Freeze the image tower (LiT)."""
    lock_image_unlocked_groups: int = Field(default=0, ge=0)
    """Last groups of the image tower that stay trainable when it is locked."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = Field(default=0, ge=0)
    """Last layers of the text tower that stay trainable when it is locked."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of image patches dropped in training (ViT only)."""
    compile: bool = False
    """torch.compile both towers."""


class LossConfig(Section):
    """The contrastive loss and its own options."""

    name: Literal["clip", "siglip"] = "clip"
    """clip: symmetric InfoNCE; siglip: pairwise sigmoid."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all pairs (clip only)."""
    mask_equal_ids: bool = True
    """The same sample twice in a global batch is not its own negative."""
    mask_equal_captions: bool = False
    """Samples with an equal caption in a global batch are not each other's negatives."""
    visiting: Literal["gather", "ring"] = "gather"
    """How texts visit the ranks: all at once, or one neighbour's at a time (less memory)."""


class OptimConfig(Section):
    """Optimizer of the towers."""

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    image_lr: float = Field(default=0.0, ge=0)
    """Peak learning rate of the image tower; 0: `lr`."""
    text_lr: float = Field(default=0.0, ge=0)
    """Peak learning rate of the text tower; 0: `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled decay of matrices; never on gains, biases, scale and bias."""
    decay_set: Literal["open_clip", "big_vision", "ndim"] = "open_clip"
    """What decays: by open_clip's published rule, big_vision's kernels only, or ndim >= 2."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate factor per layer, counted from the output; 1: none."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: never."""


class ScheduleConfig(Section):
    """Learning rate as a pure function of samples seen."""

    name: Literal["cosine", "constant", "wsd", "rsqrt"] = "cosine"
    warmup: Duration = Duration("0 steps")
    """Linear warm-up from 0."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    cooldown: Duration = Duration("0 steps")
    """wsd, rsqrt: length of the linear decay to the floor at the end."""

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
    """bf16: autocast over float32 parameters; fp16: DeepSpeed's loss scaling, GPU only."""
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


class LogConfig(Section):
    """Numbers for people."""

    every: Duration = Duration("10 steps")
    samples: bool = False
    """Write samples/step-*.json: the sample keys of every global batch, in order."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Experiment trackers, through accelerate."""


class EvalConfig(Section):
    """Evaluation of `data.val_shards` while training and in `nsphere eval`."""

    every: Duration | None = None
    """None: only at the end, if there are val shards."""
    tasks: tuple[Literal["retrieval", "zero_shot"], ...] = ("retrieval",)
    batch_size: int = Field(default=256, ge=1)
    """Samples a rank embeds at once."""
    templates: tuple[str, ...] = ("{}",)
    """Zero-shot prompts, `{}` standing for the class name; `openai` is open_clip's list of 80."""
    classes: str = ""
    """Zero-shot class names: a text file (a line each), a TSV with columns cls and name or label,
    or `imagenet`; empty: the distinct captions of each label in the evaluated shards."""


class Config(Section):
    """One run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        problems = []
        if self.train.duration.unit == "minutes":
            problems.append("train.duration is in steps, samples or epochs, not minutes")
        if self.zero.offload_param != "none" and self.zero.stage != 3:
            problems.append("zero.offload_param needs zero.stage = 3")
        if self.zero.offload_optimizer != "none" and self.zero.stage == 0:
            problems.append("zero.offload_optimizer needs zero.stage >= 1")
        if "nvme" in (self.zero.offload_param, self.zero.offload_optimizer):
            if not self.zero.nvme_path:
                problems.append("nvme offload needs zero.nvme_path")
        if self.loss.name != "clip" and self.loss.label_smoothing:
            problems.append('loss.label_smoothing needs loss.name = "clip"')
        if self.train.precision == "fp16" and self.zero.stage == 0:
            problems.append("train.precision = 'fp16' needs zero.stage >= 1")
        if self.optim.name != "adamw" and self.zero.stage != 0:
            problems.append(
                f'optim.name = "{self.optim.name}" works on whole matrices, which ZeRO cuts up:'
                " set zero.stage = 0"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, check everything at once.

    Raises ConfigError naming the file and every bad key, with the nearest known ones.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    for name, texts in _group_overrides(overrides or []).items():
        _apply_override(tree, name, texts)
    _find_model_file(tree, path.parent)
    return parse_config(tree, str(path))


def load_overrides(overrides: list[str]) -> Config:
    """The defaults with `section.key=value` overrides, for commands that need no file."""
    tree: dict[str, Any] = {}
    for name, texts in _group_overrides(overrides).items():
        _apply_override(tree, name, texts)
    return parse_config(tree, "command line")


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Check a tree of plain values; `origin` is the file or place named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _group_overrides(overrides: list[str]) -> dict[str, list[str]]:
    """Values by key. A shell makes of x-{0..7}.tar an override a shard: they belong together."""
    grouped: dict[str, list[str]] = {}
    for override in overrides:
        name, equals, text = override.lstrip("-").partition("=")
        if not equals or "." not in name:
            raise ConfigError(f"{override}: an override is written --section.key=value")
        grouped.setdefault(name, []).append(text)
    return grouped


def _apply_override(tree: dict[str, Any], name: str, texts: list[str]) -> None:
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{name}: {section} is a value, not a section")
    if len(texts) > 1 and not key.endswith("shards"):
        raise ConfigError(f"--{name} is given {len(texts)} times: {', '.join(texts)}")
    tree[key] = texts if len(texts) > 1 else _parse_value(texts[0])


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --model.name=ViT-B-32


def _find_model_file(tree: dict[str, Any], folder: Path) -> None:
    """A model file that is not found from here is looked for from the configuration's folder."""
    model = tree.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and name.endswith(".json") and not Path(name).exists():
        beside = folder / name
        if beside.exists():
            tree["model"] = {**tree["model"], "name": str(beside)}


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = sorted(_known_keys(Config))
        near = difflib.get_close_matches(where, known, n=3, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == where.rsplit(".", 1)[-1]]
        return f"unknown key {where}; nearest: {', '.join(near) if near else 'none'}"
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{where} = {item['input']!r}: {text}" if where else text


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _known_keys(annotation, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys


def dump_config(config: Config) -> str:
    """The configuration as TOML text that `load_config` reads back to an equal value."""
    tree = config.model_dump(mode="json", exclude_none=True)
    return "\n".join(_dump_table(name, table) for name, table in tree.items())


def _dump_table(name: str, table: dict[str, Any]) -> str:
    lines, nested = [f"[{name}]"], []
    for key, value in table.items():
        if isinstance(value, dict):
            nested.append(_dump_table(f"{name}.{key}", value))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            nested += [
                "\n".join(
                    [f"[[{name}.{key}]]", *(f"{k} = {_dump_value(v)}" for k, v in row.items())]
                )
                + "\n"
                for row in value
            ]
        else:
            lines.append(f"{key} = {_dump_value(value)}")
    return "\n".join(["\n".join(lines) + "\n", *nested])


def _dump_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_dump_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\' or ord(c) == 127 else c for c in value
        )
        return f'"{escaped}"'
    return repr(value)


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configurations differ, each with both values."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, value in tree.items():
            rows.update(
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return rows

    a, b = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in a | b if a.get(key) != b.get(key)]
