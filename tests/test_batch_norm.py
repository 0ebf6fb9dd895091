"""Batch norm over ranks is one process's nn.BatchNorm over all their samples."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from tiny_faces import face_config
from tiny_runs import read_losses, train_rank
from torch import Tensor, nn

from trainer.checkpoint import load_weights
from trainer.collectives import own_rank
from trainer.config import ConfigError
from trainer.models.batch_norm import GlobalBatchNorm, global_moments, make_batch_norm_global
from trainer.models.recompute import recomputed, statistics_kept

SPLITS = [[7], [3, 4], [6, 1], [2, 4, 1], [5, 0, 2], [0, 7, 0]]


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layers(name: str) -> tuple[nn.Module, Tensor]:
    """A small network with batch norms, float64, and the seven samples of a global batch."""
    torch.manual_seed(3)
    if name == "rows":
        return nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.BatchNorm1d(6, affine=False)
        ).double(), drawn(1, 7, 5)
    if name == "signals":
        return nn.Sequential(
            nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.BatchNorm1d(4, eps=1e-2)
        ).double(), drawn(2, 7, 4, 9) + 3
    if name == "volumes":
        return nn.Sequential(nn.BatchNorm3d(2), nn.Tanh(), nn.BatchNorm3d(2)).double(), drawn(
            2, 7, 2, 3, 2, 4
        )
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        BatchNormAct2d(6) if name == "timm" else nn.BatchNorm2d(6),
        nn.PReLU(6),
        nn.Conv2d(6, 5, 3, 2),
        nn.BatchNorm2d(5, track_running_stats=name != "timm"),
    ).double()
    network[4].weight.requires_grad_(name != "images")
    images = drawn(4, 7, 3, 9, 7) * 2 + 1
    if name == "images":
        return network, images
    return network.to(memory_format=torch.channels_last), images.to(
        memory_format=torch.channels_last
    )


NAMES = ["rows", "signals", "volumes", "images", "channels_last", "timm"]


def two_steps(network: nn.Module, x: Tensor, weights: Tensor, rows: slice) -> dict[str, Tensor]:
    """Outputs and gradients of the rows in two passes, and the averages after them."""
    found = {}
    for step in range(2):
        own = (x[rows] * (1 + step)).detach().requires_grad_()
        network.zero_grad()
        y = network(own)
        (y.sin() * weights[rows]).sum().backward()
        found |= {f"y{step}": y.detach(), f"x{step}": own.grad}
        for key, parameter in network.named_parameters():
            if parameter.requires_grad:
                found[f"gradient {key} {step}"] = parameter.grad.clone()
    found |= {f"buffer {k}": b.clone() for k, b in network.named_buffers()}
    network.eval()
    with torch.no_grad():
        found["evaluated"] = network(x[:4])
    return found


def one_rank(group, counts: list[int], names: list[str]) -> dict[str, dict[str, Tensor]]:
    start = sum(counts[: own_rank(group)])
    found = {}
    for name in names:
        network, x = layers(name)
        weights = drawn(9, 7, 1).view(7, *(1,) * (x.ndim - 1))
        keys = list(network.state_dict())
        num_norms = sum("BatchNorm" in type(m).__name__ for m in network)
        made = make_batch_norm_global(network, group)
        assert made == (0 if len(counts) == 1 else num_norms)
        assert list(network.state_dict()) == keys
        rows = slice(start, start + counts[own_rank(group)])
        found[name] = two_steps(network, x, weights, rows)
    return found


@pytest.mark.parametrize("counts", SPLITS, ids=str)
def test_any_split_over_ranks_is_the_one_process(counts):
    everything = run_ranks(len(counts), one_rank, counts, NAMES)
    for name in NAMES:
        network, x = layers(name)
        expected = two_steps(network, x, drawn(9, 7, 1).view(7, *(1,) * (x.ndim - 1)), slice(0, 7))
        found = [of_rank[name] for of_rank in everything]
        for key, value in expected.items():
            parts = [part[key] for part in found]
            if key[0] in "yx":
                whole = torch.cat(parts)
            elif key.startswith("gradient"):
                whole = torch.stack(parts).sum(0)
            else:
                whole = parts[0]
                assert all(torch.equal(part, whole) for part in parts[1:]), (name, key)
            assert (whole - value).abs().max() < 1e-10, (name, key)


def alone(norm: nn.Module) -> GlobalBatchNorm:
    """A batch norm turned into a global one of a single process."""
    norm.__class__ = GlobalBatchNorm
    norm.group = None
    return norm


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 24), (8, 24, 5), (8, 24, 6, 7), (3, 24, 64, 64)], ids=str)
def test_alone_it_is_torchs_in_every_dtype(device, dtype, shape):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    drawn_x, gradient = (drawn(seed, *shape).to(device, dtype) for seed in (1, 2))
    if len(shape) == 4:
        drawn_x = drawn_x.contiguous(memory_format=torch.channels_last)
    outcomes = []
    for make in (alone, lambda norm: norm):
        norm = nn.BatchNorm2d(24) if len(shape) == 4 else nn.BatchNorm1d(24)
        norm = norm.to(device, torch.float64 if make is not alone else parameters)
        with torch.no_grad():
            norm.weight.copy_(drawn(3, 24))
        exact = drawn_x.double() if make is not alone else drawn_x.clone()
        x = (exact + 2).requires_grad_()
        y = make(norm)(x)
        y.backward(gradient.to(y.dtype))
        if make is alone:
            assert y.dtype == dtype and y.stride() == x.stride() and x.grad.stride() == x.stride()
        outcomes.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
    for found, expected in zip(*outcomes, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        assert (found.double() - expected).abs().max() <= tolerance * scale


def autocast_rank(group) -> tuple[Tensor, Tensor]:
    network, x = layers("channels_last")
    network, x = network.float(), x.float()
    make_batch_norm_global(network, group)
    own = x.tensor_split(group.size())[group.rank()].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(own)
    assert y.dtype == torch.bfloat16 and network[1].running_mean.dtype == torch.float32
    y.float().sin().sum().backward()
    assert network[1].weight.grad.dtype == torch.float32
    return y.detach(), own.grad


def test_autocast_is_as_near_to_float64_as_torchs():
    network, x = layers("channels_last")
    x.requires_grad_()
    y = network(x)
    y.sin().sum().backward()
    errors = []
    for world_size in (1, 2):
        outputs, gradients = zip(*run_ranks(world_size, autocast_rank), strict=True)
        pairs = ((outputs, y.detach()), (gradients, x.grad))
        errors.append([(torch.cat(a).double() - b).norm() / b.norm() for a, b in pairs])
    for torchs, ours in zip(*errors, strict=True):
        assert ours < 1.5 * torchs < 0.1


def far_rank(group, x: Tensor) -> tuple[Tensor, Tensor]:
    moments = global_moments(x.tensor_split(group.size())[group.rank()], group)
    return moments.mean, moments.variance


def test_a_mean_far_from_zero_and_ranks_far_apart_cancel_nothing():
    x = (drawn(5, 30, 3, 4, 4) * 0.1 + 3000).float()
    x[10:20] += 1
    for mean, variance in run_ranks(3, far_rank, x):
        exact = x.double().var((0, 2, 3), correction=0)
        assert ((variance - exact) / exact).abs().max() < 2e-3  # naive sums: 1
        assert (mean - x.double().mean((0, 2, 3))).abs().max() < 1e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x)).tanh()


def recomputed_rank(group, recompute: bool) -> list[Tensor]:
    torch.manual_seed(0)
    block = Block().double()
    make_batch_norm_global(block, group)
    x = drawn(6, 6, 3, 5, 5).tensor_split(2)[group.rank()].requires_grad_()
    (recomputed(block, x) if recompute else block(x)).square().sum().backward()
    return [x.grad, block.norm.running_var, block.norm.num_batches_tracked, block.norm.weight.grad]


def test_recomputing_a_block_moves_its_averages_once():
    for plain, again in zip(
        *(run_ranks(2, recomputed_rank, r) for r in (False, True)), strict=True
    ):
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_averages_stay_inside_statistics_kept():
    norm = alone(nn.BatchNorm1d(3))
    with statistics_kept(norm):
        norm(torch.randn(4, 3))
    assert norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0


def refused_rank(group) -> str:
    with pytest.raises(ConfigError, match="global_batch_norm") as caught:
        make_batch_norm_global(nn.Sequential(nn.ReLU(), SplitBatchNorm2d(4)), group)
    return str(caught.value)


def test_a_kind_without_a_version_over_ranks_is_named():
    assert "1 is a SplitBatchNorm2d" in run_ranks(2, refused_rank)[0]


def hooked_rank(group) -> bool:
    norm = nn.BatchNorm1d(3)
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    weight, mean = norm.weight, norm.running_mean
    assert make_batch_norm_global(norm, group) == 1
    norm(torch.randn(2, 3))
    return seen == [1] and norm.weight is weight and norm.running_mean is mean


def test_hooks_parameters_and_averages_stay_the_same_objects():
    assert run_ranks(2, hooked_rank) == [True, True]


def trained(folder: Path, world_size: int, chunk_size: int, **model) -> tuple[dict, dict]:
    """Losses by step and the last weights of five steps of a convolutional network on faces."""
    config = face_config(
        folder,
        model={"name": "timm:test_efficientnet", "global_batch_norm": True, **model},
        optim={"name": "sgd", "lr": 0.05},
        train={"duration": "5 steps", "chunk_size": chunk_size},
        zero={"stage": 2},
    )
    run = folder / f"run-{world_size}-{chunk_size}-{len(model)}"
    run_ranks(world_size, train_rank, config, str(run))
    return read_losses(run), load_weights(run / "checkpoints" / "step-00000005")


def test_a_face_run_is_the_same_on_any_number_of_ranks(tmp_path):
    losses, weights = trained(tmp_path, 1, 0)
    found, others = trained(tmp_path, 3, 0)
    assert found == pytest.approx(losses, abs=1e-4)
    for name, tensor in weights.items():
        assert (others[name] - tensor).abs().max() < 1e-3, name
    apart, _ = trained(tmp_path, 3, 0, global_batch_norm=False)
    assert abs(apart[5] - losses[5]) > 1e-2


@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_move_once_for_each_chunk(tmp_path, world_size):
    _, weights = trained(tmp_path, world_size, 4)
    chunks = 16 // world_size // 4
    counts = [int(t) for name, t in weights.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {5 * chunks}
