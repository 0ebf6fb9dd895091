"""What DeepSpeed holds for the towers at each ZeRO stage: at rest, and while it reduces gradients.

Sizes are of DeepSpeed 0.19's own tensors as they were counted in real engines on one and two ranks
(tests/test_estimate.py counts them again). All is float32: precision is autocast.
"""

from dataclasses import dataclass

from torch import nn

from trainer.config import Config, OptimConfig
from trainer.engine import deepspeed_config
from trainer.estimate.meter import HEAP_BLOCK
from trainer.estimate.terms import Term
from trainer.objectives import Model
from trainer.optim import parameter_groups

DEFAULT_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, where none is configured
FLOAT = 4


@dataclass(frozen=True)
class Towers:
    """Sizes of a model, in bytes of float32."""

    trained: int
    frozen: int
    buffers: int
    small: int
    """Of `trained`, tensors below `HEAP_BLOCK`."""
    moments: int
    """Of the optimizer, for all that is trained."""
    num_parameters: int

    @classmethod
    def of(cls, model: Model, config: OptimConfig) -> "Towers":
        """Count; the model may be on the meta device."""
        trained = [p.numel() * FLOAT for p in model.parameters() if p.requires_grad]
        return cls(
            trained=sum(trained),
            frozen=sum(p.numel() * FLOAT for p in model.parameters() if not p.requires_grad),
            buffers=sum(buffer.nbytes for buffer in model.buffers()),
            small=sum(size for size in trained if size < HEAP_BLOCK),
            moments=_moments(model, config),
            num_parameters=sum(p.numel() for p in model.parameters()),
        )


def _moments(model: nn.Module, config: OptimConfig) -> int:
    """Two for each parameter, one of them idle with SGD; Muon one for kernels."""
    copies = 1 if config.name == "muon" else 2
    total = 0
    for group in parameter_groups(model, config):  # type: ignore[arg-type]
        each = 2 if config.name == "muon" and group["use_fallback"] else copies
        total += each * sum(p.numel() * FLOAT for p in group["params"])
    return total


@dataclass(frozen=True)
class EngineState:
    """The towers' state under DeepSpeed on one of `world_size` ranks."""

    towers: Towers
    stage: int
    world_size: int
    is_gpu: bool
    bucket_elements: int
    offload_optimizer: bool = False
    offload_param: bool = False

    @classmethod
    def of(cls, towers: Towers, config: Config, world_size: int, *, is_gpu: bool) -> "EngineState":
        """As `trainer/engine.py` configures it."""
        section = deepspeed_config(config, world_size)["zero_optimization"]
        return cls(
            towers,
            config.zero.stage,
            world_size,
            is_gpu,
            int(section.get("reduce_bucket_size", DEFAULT_BUCKET)),
            is_gpu and config.zero.offload_optimizer != "none",
            is_gpu and config.zero.offload_param != "none",
        )

    def part(self, size: int) -> int:
        """A rank's share of what is cut into equal parts."""
        return -(-size // self.world_size)

    @property
    def bucket(self) -> int:
        """Bytes of the buffer in which gradients are collected before they are reduced.

        DeepSpeed asks for all of it at once: on a GPU that is memory, on a CPU only what is used.
        """
        if self.stage == 0:
            return 0
        used = min(self.towers.trained, self.bucket_elements * FLOAT)
        return self.bucket_elements * FLOAT if self.is_gpu else used

    def at_rest(self) -> list[Term]:
        """From the first step on, between steps."""
        towers, sharded = self.towers, self.stage > 0
        whole = towers.trained + towers.frozen
        weights = self.part(whole) if self.stage == 3 else whole
        moments = self.part(towers.moments) if sharded else towers.moments
        master = self.part(towers.trained) if sharded else 0
        terms = [
            Term("parameters", (0 if self.offload_param else weights) + towers.buffers),
            Term("optimizer: moments", 0 if self.offload_optimizer else moments),
            Term("optimizer: float32 copy of ZeRO", 0 if self.offload_optimizer else master),
        ]
        if self.stage == 3:
            gradients = self.part(towers.trained)
            terms.append(Term("gradients: part of stage 3", gradients))
            terms.append(Term("gradients: bucket", self.bucket))
        return terms

    def on_host(self) -> int:
        """What offloading puts into the host's memory instead, for each rank."""
        towers = self.towers
        total = 0
        if self.offload_optimizer:  # with a gradient for the optimizer that runs there
            total += self.part(towers.moments) + 2 * self.part(towers.trained)
        if self.offload_param:
            total += self.part(towers.trained + towers.frozen)
        return total

    def while_embedding(self, *, cached: bool) -> list[Term]:
        """Beside activations, in the backward pass. `cached`: earlier chunks left gradients."""
        terms = []
        if self.stage == 3 and self.world_size > 1:
            terms.append(Term("parameters: gathered", self.towers.trained + self.towers.frozen))
        if cached:
            terms.append(Term("gradients", self.towers.trained))
        if self.stage in (1, 2) and self.is_gpu:
            terms.append(Term("gradients: bucket", self.bucket))
        return terms

    def while_reducing(self) -> list[Term]:
        """Gradients are complete: they are copied together, exchanged and handed out."""
        trained, used = self.towers.trained, min(self.towers.trained, self.bucket_elements * FLOAT)
        if self.stage == 0:
            return [Term("gradients", trained), Term("gradients: copy that is reduced", used)]
        later = self.part(max(0, trained - used))
        if self.stage < 3:
            return [
                Term("gradients: bucket", self.bucket),
                Term("gradients: copy that is reduced", used),
                Term("gradients: reduced before", later),
            ]
        if self.world_size == 1:
            return [Term("gradients: copies that are reduced", 2 * used)]
        terms = [
            Term("parameters: gathered", trained + self.towers.frozen),
            Term("gradients: copies that are reduced", used + self.part(used) // 2),
        ]
        if not self.is_gpu:
            terms.append(Term("gradients: gloo's own copy", used))
        return terms

    def heap_bytes(self, activations: int) -> int:
        """Most that lives at once in blocks below `HEAP_BLOCK` (CPU), of `activations` such bytes.

        Parameters lie in blocks of their own until ZeRO flattens them, gathered ones again.
        """
        share = self.towers.small / max(1, self.towers.trained)
        if self.stage == 0:
            state = self.towers.small + int(share * self.towers.moments)
            return state + activations
        if self.stage < 3:
            return max(self.towers.small, activations)
        gathered = self.towers.small if self.world_size > 1 else 0
        return self.towers.small + max(gathered, activations)

    def small_at_rest(self) -> int:
        """Of `at_rest`, what lies in the heap."""
        share = self.towers.small / max(1, self.towers.trained)
        return self.towers.small + int(share * self.towers.moments) if self.stage == 0 else 0

    def checkpoint_bytes(self) -> tuple[int, int]:
        """DeepSpeed's files: of all ranks, and of the rank that writes most."""
        towers = self.towers
        whole = towers.trained + towers.frozen + towers.buffers
        if self.stage == 0:
            return whole + towers.moments, whole + towers.moments
        optimizer = towers.moments + towers.trained
        if self.stage < 3:
            return whole + optimizer, whole + self.part(optimizer)
        frozen = towers.frozen + towers.buffers * self.world_size
        return optimizer + frozen, self.part(optimizer) + frozen
