"""DeepSpeed for the replicated towers: averaging, clipping, ZeRO 0-3. Only this file imports it.

What lives here: one engine with `backward`, `step`, `files`, `load`, and our configuration as
DeepSpeed's. What does not: the loss (its gradient arrives through the embeddings), and the
checkpoint protocol (`trainer/checkpoint.py`), which decides when a saved folder counts.

Parameters stay float32 at every stage; lower precision is autocast (`trainer/step.py`). DeepSpeed's
own bf16 and fp16 modes would round `log_scale`, and at stage 0 take a phantom Adam step.
"""

import contextlib
import io
import logging
import math
import os
import pickle
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns on every rank

import deepspeed
import deepspeed.ops
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from trainer.checkpoint import CheckpointError
from trainer.config import Config, ZeroConfig
from trainer.ranks import Ranks

TAG = "deepspeed"  # the folder of DeepSpeed's own files inside a checkpoint
UNTRAINED = "untrained.safetensors"  # beside a converted checkpoint
STORED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]  # plain numbers, all three
LOSS_SCALE_START = 2.0**16  # fp16: torch.amp.GradScaler's published defaults
LOSS_SCALE_GROWTH_STEPS = 2000

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# An inference kernel that init_distributed would compile first: 20 s to 1 min, never used here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    applied: bool  # False: a gradient was not finite, on some rank, and nothing was changed
    grad_norm: float  # global 2-norm before clipping; inf when not applied
    rescaled: bool = False  # not applied, but only because fp16's loss scale was too high


def deepspeed_config(config: Config, world_size: int, *, universal: bool = False) -> dict[str, Any]:
    """Our configuration as DeepSpeed's JSON; `universal` to load one of another world size."""
    zero = config.zero
    rows = -(-config.train.global_batch_size // world_size)
    section: dict[str, Any] = {"stage": zero.stage}
    for name in ("offload_optimizer", "offload_param"):
        device = getattr(zero, name)
        if device != "none":
            section[name] = {"device": device, "pin_memory": torch.cuda.is_available()}
            if device == "nvme":
                section[name]["nvme_path"] = zero.nvme_path
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,  # chunks are ours: the boundary is set by hand
        # At stage 0 the norm must be known before the step, so the clipping is ours there.
        "gradient_clipping": config.optim.clip_norm if zero.stage else 0.0,
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Fail", "load_universal": universal},
        "steps_per_print": 10**9,
    }


class Engine:
    """The towers under DeepSpeed: gradients averaged over ranks, clipped, applied, sharded."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        ranks: Ranks,
        *,
        universal: bool = False,
    ) -> None:
        """Wrap `model` (float32, on `ranks.device`); every rank must call this together.

        `universal`: the state comes from `load` with a checkpoint of another world size.
        """
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, ranks.world_size, universal=universal),
        )
        self.model = model
        self.universal = universal
        self._optimizer = optimizer
        self._zero: ZeroConfig = config.zero
        self._clip_norm = config.optim.clip_norm
        self._ranks = ranks
        self._groups = [_hyperparameters(group) for group in optimizer.param_groups]
        self._loss_scale = LOSS_SCALE_START if config.train.precision == "fp16" else 1.0
        self._good_steps = 0
        self._dynamic_scale = config.train.precision == "fp16"
        self._set_loss_scale(self._loss_scale)

    def forward_model(self) -> nn.Module:
        """The module to call: DeepSpeed's wrapper, which fetches stage-3 parameters."""
        return self._deepspeed

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`; `last` marks the step's last call, which reduces."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        if self._zero.stage == 0 and self._dynamic_scale:
            loss = loss * self._loss_scale
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """Clip by the global norm and update; a non-finite norm leaves everything unchanged.

        Every parameter group's rate is `learning_rate` times its own `lr_scale`.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        result = self._step_replicated() if self._zero.stage == 0 else self._step_sharded()
        if not self._dynamic_scale:
            return result
        rescaled = not result.applied and self._loss_scale > 1.0
        self._update_loss_scale(applied=result.applied)
        return replace(result, rescaled=rescaled)

    def _step_replicated(self) -> StepResult:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / self._loss_scale
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            self._deepspeed.zero_grad()
            return StepResult(applied=False, grad_norm=math.inf)
        factor = 1.0 / self._loss_scale
        if 0 < self._clip_norm < grad_norm:
            factor *= self._clip_norm / (grad_norm + 1e-6)
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        self._deepspeed.step()
        return StepResult(applied=True, grad_norm=grad_norm)

    def _step_sharded(self) -> StepResult:
        self._deepspeed.step()
        applied = bool(self._deepspeed.was_step_applied())
        grad_norm = float(self._deepspeed.get_global_grad_norm()) if applied else math.inf
        return StepResult(applied=applied, grad_norm=grad_norm)

    def _update_loss_scale(self, *, applied: bool) -> None:
        self._good_steps = self._good_steps + 1 if applied else 0
        if not applied:
            self._set_loss_scale(max(1.0, self._loss_scale / 2))
        elif self._good_steps % LOSS_SCALE_GROWTH_STEPS == 0:
            self._set_loss_scale(self._loss_scale * 2)

    def _set_loss_scale(self, scale: float) -> None:
        self._loss_scale = scale
        if self._dynamic_scale and self._zero.stage:
            self._deepspeed.optimizer.override_loss_scale(scale)

    def discard(self) -> None:
        """Drop the accumulated gradients without a step (the loss was not finite)."""
        self._deepspeed.zero_grad()
        if self._zero.stage:
            self._deepspeed.optimizer.zero_grad()

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, low: float, high: float) -> None:
        """Clamp a parameter in place, where it lives and where the sharded optimizer keeps it."""
        if self._zero.stage == 0:
            parameter.clamp_(low, high)
            return
        value = safe_get_full_fp32_param(parameter)
        if value is None or bool(((value >= low) & (value <= high)).all()):
            return
        value = value.clamp(low, high)
        safe_set_full_fp32_param(parameter, value)
        with self.gathered([parameter], modify=True):
            parameter.data.copy_(value)

    @contextlib.contextmanager
    def gathered(self, parameters: list[nn.Parameter], *, modify: bool = False) -> Iterator[None]:
        """Inside, stage-3 parameters are whole on every rank; at other stages they always are."""
        modifier = 0 if modify else None
        with deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=modifier, enabled=self._zero.stage == 3
        ):
            yield

    def release(self) -> None:
        """Forget gathered copies of stage-3 parameters: their parts have been written to.

        DeepSpeed keeps small parameters whole between steps and would go on using the old values.
        """
        if self._zero.stage == 3:
            for parameter in self.model.parameters():
                if getattr(parameter, "ds_status", None) is ZeroParamStatus.AVAILABLE:
                    parameter.partition()  # type: ignore[attr-defined]

    def state(self) -> dict[str, float]:
        """What resume needs beside DeepSpeed's files: plain numbers, equal on all ranks."""
        return {"loss_scale": self._loss_scale, "good_steps": self._good_steps}

    def files(self) -> dict[str, Any]:
        """This rank's part of the state: file name in the checkpoint -> what torch.save writes.

        Every rank calls it together. DeepSpeed only names and gathers: its own writing is not safe
        against a crash, and a disk that is full on one rank would leave the others waiting in its
        barriers. The tensors are the live ones, so copy them if training goes on before they are
        written.
        """
        writer = self._deepspeed.checkpoint_engine
        captured = _Capture()
        self._deepspeed.checkpoint_engine = captured
        try:
            with tempfile.TemporaryDirectory() as folder:  # it drops its recovery scripts here
                self._deepspeed.save_checkpoint(
                    folder,
                    tag=TAG,
                    client_state={
                        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}
                    },
                    save_latest=False,
                )
        finally:
            self._deepspeed.checkpoint_engine = writer
        return captured.files

    def load(self, folder: Path, state: dict[str, float]) -> None:
        """Load what `files` gave (or `to_universal` converted) and `state` returned."""
        with tensors_only(folder):
            path, _ = self._deepspeed.load_checkpoint(
                str(folder), tag=TAG, load_lr_scheduler_states=False
            )
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint in it")
        if self.universal:
            self._load_untrained(safetensors.torch.load_file(folder / TAG / UNTRAINED))
        self._repair_optimizer()
        self._good_steps = int(state["good_steps"])
        self._set_loss_scale(state["loss_scale"])

    @torch.no_grad()
    def _load_untrained(self, tensors: dict[str, Tensor]) -> None:
        """Buffers and frozen parameters: DeepSpeed's universal load knows what it optimizes only.

        0.19.8, engine.py:4660: statistics of batch norms would begin anew, a locked tower would
        keep the weights that this process happened to draw.
        """
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        for name, tensor in tensors.items():
            if name in buffers:
                buffers[name].copy_(tensor)
                continue
            if name in parameters:  # else it is another name of one that is trained
                with self.gathered([parameters[name]], modify=True):
                    parameters[name].copy_(tensor)

    def _repair_optimizer(self) -> None:
        """Undo two faults of DeepSpeed's stage-3 universal load (0.19.8, stage3.py:3653-3691).

        It gives every group the first group's hyperparameters (weight decay!), and one shared
        `step` tensor, which AdamW then counts up once per group. Harmless where neither happened.
        """
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(saved)
        for entry in self._optimizer.state.values():
            if isinstance(entry.get("step"), Tensor):
                entry["step"] = entry["step"].clone()


class _Capture(CheckpointEngine):
    """Stands where DeepSpeed's writer of checkpoints stands, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep one file's content."""
        self.files[f"{TAG}/{Path(path).name}"] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Not used while saving."""
        raise NotImplementedError(path)

    def commit(self, info: Any) -> bool:  # noqa: ARG002 - DeepSpeed's interface
        """Nothing was written, so nothing can have failed."""
        return True


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def to_universal(folder: Path, out: Path) -> None:
    """Convert `folder/deepspeed` (stages 1-3) so that any world size can load it from `out`.

    Runs in this process on one rank, about a second for a small model.
    """
    from deepspeed.checkpoint.ds_to_universal import main as convert

    options = Namespace(
        input_folder=str(folder / TAG),
        output_folder=str(out / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _silence(), tensors_only(folder):
        convert(options)
        safetensors.torch.save_file(_untrained(folder / TAG), out / TAG / UNTRAINED)


def _untrained(folder: Path) -> dict[str, Tensor]:
    """Buffers and frozen parameters, whole, out of DeepSpeed's files of stages 1-3."""
    names = (re.match(r"(?:zero_pp_rank_(\d+)_)?mp_rank", path.name) for path in folder.iterdir())
    files = {int(m[1] or 0): m.string for m in names if m and "model_states" in m.string}
    paths = [folder / files[rank] for rank in sorted(files)]
    saved = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    module, frozen = saved[0]["module"], saved[0]["frozen_param_shapes"] or {}
    if paths[0].name.startswith("zero_pp"):  # stage 3: a piece a rank, the last one padded
        tensors = {name: module[name] for name in saved[0]["buffer_names"] if name in module}
        for name, shape in frozen.items():
            whole = torch.cat([part["frozen_param_fragments"][name].flatten() for part in saved])
            tensors[name] = whole[: shape.numel()].view(shape)
    else:
        trained = {name for group in saved[0]["param_shapes"] for name in group}
        tensors = {name: module[name] for name in module.keys() - trained}
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def read_weights(folder: Path, stage: int) -> dict[str, Tensor]:
    """Whole float32 weights out of `folder/deepspeed`, in one process, at any stage."""
    weights: dict[str, Tensor] = {}
    with _silence(), tensors_only(folder):
        if stage > 0:
            weights = dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG))
        if stage < 2:  # at stage 1 DeepSpeed's reader leaves out what is frozen
            path = folder / TAG / "mp_rank_00_model_states.pt"
            saved = torch.load(path, map_location="cpu", weights_only=True)
            module = {name: tensor.float() for name, tensor in saved["module"].items()}
            weights = module | weights
    return weights


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Inside, what DeepSpeed prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def tensors_only(folder: Path) -> Iterator[None]:
    """Inside, files of a checkpoint are tensors and plain values to every reader, or an error.

    A pickle can call whatever it names, a checkpoint may come from elsewhere, and DeepSpeed reads
    with `weights_only=False` wherever it reads: torch's own switch overrules it. Raises
    CheckpointError naming what a file would have called.
    """
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals(STORED_CLASSES):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"names {found[1]}" if found else f"is none of ours ({str(error).splitlines()[0]})"
        raise CheckpointError(
            f"{folder / TAG}: a file in it {what}, where tensors and plain values belong: nothing "
            "of it was run; do not use this checkpoint"
        ) from None
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
