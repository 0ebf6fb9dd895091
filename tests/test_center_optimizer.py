"""The optimizer on touched rows: against torch's own, dense or one row at a time, in float64."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.centers import catch_up as catch_up_module
from trainer.centers import rows as rows_module
from trainer.centers.optimizer import SparseOptimizer
from trainer.centers.rows import RoundingNoise, round_stochastically
from trainer.config import CentersConfig, ConfigError

CPU = torch.device("cpu")
UNBOUNDED = (0.0, math.inf)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def build(num_rows=10, dim=4, *, first_row=0, seed=0, device=CPU, compute=torch.float32, **fields):
    config = CentersConfig(**{"norm_bounds": UNBOUNDED, "mode": "lazy", **fields})
    return SparseOptimizer(
        config,
        num_rows=num_rows,
        dim=dim,
        first_row=first_row,
        device=device,
        seed=seed,
        compute_dtype=compute,
    )


def start_rows(num_rows, dim, dtype=torch.float64, seed=1):
    return torch.randn(num_rows, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def visits(num_steps, num_rows, dim, seed=2, dtype=torch.float64):
    """For each step: the touched rows (often none, at times all), gradients, a learning rate."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        share = (0.05, 0.3, 0.0, 1.0, 0.1)[int(torch.randint(5, (), generator=generator))]
        touched = (torch.rand(num_rows, generator=generator) < share).nonzero()[:, 0]
        gradients = torch.randn(num_rows, dim, dtype=torch.float64, generator=generator).to(dtype)
        yield touched, gradients, 0.1 * (1.0 + math.sin(0.3 * step)) * (step % 7 != 3)


def run(optimizer, start, steps):
    """A whole run; returns all rows, at the present step."""
    optimizer.fill(0, start)
    for ids, gradients, lr in steps:
        optimizer.begin(ids)
        optimizer.update(ids, gradients[ids], lr)
        optimizer.end(lr)
    optimizer.finish()
    return optimizer.rows(slice(None)).clone()


# --- equal to torch ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [
        (0.9, False, 5e-4),
        (0.9, True, 0.02),
        (0.99, False, 0.1),
        (0.5, True, 0.0),
        (0.9, False, 0.0),
        (0.0, False, 0.1),
        (0.0, False, 0.0),
    ],
)
def test_exact_sgd_is_dense_sgd(momentum, nesterov, weight_decay):
    kind = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    start = start_rows(23, 3)
    optimizer = build(23, 3, mode="exact", compute=torch.float64, **kind)
    optimizer.fill(0, start)
    dense = nn.Parameter(start.clone())
    reference = torch.optim.SGD([dense], lr=1.0, **kind)
    for ids, gradients, lr in visits(200, 23, 3):
        optimizer.begin(ids)
        # What the forward pass reads is what a dense optimizer would have it read.
        torch.testing.assert_close(optimizer.rows(ids), dense[ids].detach(), rtol=1e-10, atol=1e-12)
        optimizer.update(ids, gradients[ids], lr)
        optimizer.end(lr)
        dense.grad = torch.zeros_like(gradients).index_copy_(0, ids, gradients[ids])
        reference.param_groups[0]["lr"] = lr
        reference.step()
    optimizer.finish()
    torch.testing.assert_close(optimizer.rows(slice(None)), dense.data, rtol=1e-10, atol=1e-12)
    if momentum:
        torch.testing.assert_close(
            optimizer.tables()["momentum"],
            reference.state[dense]["momentum_buffer"],
            rtol=1e-10,
            atol=1e-12,
        )


@pytest.mark.parametrize("nesterov", [False, True])
def test_exact_sgd_in_float32_is_dense_sgd_to_rounding(nesterov):
    kind = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 5e-3}
    start, steps = start_rows(40, 8, torch.float32), list(visits(300, 40, 8, dtype=torch.float32))
    got = run(build(40, 8, mode="exact", **kind), start, steps)
    dense = nn.Parameter(start.double())
    reference = torch.optim.SGD([dense], lr=1.0, **kind)
    for ids, gradients, lr in steps:
        dense.grad = torch.zeros_like(dense).index_copy_(0, ids, gradients[ids].double())
        reference.param_groups[0]["lr"] = lr
        reference.step()
    torch.testing.assert_close(got.double(), dense.data, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_with_all_rows_touched_it_is_torch(name, mode):
    start = start_rows(50, 8)
    optimizer = build(50, 8, optimizer=name, mode=mode, weight_decay=0.01, compute=torch.float64)
    optimizer.fill(0, start)
    dense = nn.Parameter(start.clone())
    reference = (
        torch.optim.SGD([dense], lr=1.0, momentum=0.9, weight_decay=0.01)
        if name == "sgd"
        else torch.optim.AdamW([dense], lr=1.0, weight_decay=0.01)
    )
    for _, gradients, lr in visits(40, 50, 8):
        optimizer.begin(slice(0, 50))
        optimizer.update(slice(0, 20), gradients[:20], lr)
        optimizer.update(slice(20, None), gradients[20:], lr)
        optimizer.end(lr)
        dense.grad = gradients
        reference.param_groups[0]["lr"] = lr
        reference.step()
        torch.testing.assert_close(optimizer.rows(slice(None)), dense.data, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_each_row_is_a_parameter_of_its_own(name, mode):
    """Lazy: torch's optimizer on each row alone, stepped when touched. Exact: decay besides."""
    if (name, mode) == ("sgd", "exact"):
        pytest.skip("equal to the dense optimizer, tested above")
    start, steps, decay = start_rows(9, 5), list(visits(150, 9, 5)), 0.03
    got = run(
        build(9, 5, optimizer=name, mode=mode, weight_decay=decay, compute=torch.float64),
        start,
        steps,
    )
    for row in range(9):
        alone = nn.Parameter(start[row].clone())
        reference = {
            "sgd": lambda p: torch.optim.SGD([p], lr=1.0, momentum=0.9, weight_decay=decay),
            "adamw": lambda p: torch.optim.AdamW([p], lr=1.0, weight_decay=decay),
            "adagrad": lambda p: None,
        }[name](alone)
        squares = 0.0
        for ids, gradients, lr in steps:
            if row not in ids.tolist():
                alone.data *= 1 - lr * decay if mode == "exact" else 1.0
            elif name == "adagrad":
                squares += float(gradients[row].square().mean())
                alone.data *= 1 - lr * decay
                alone.data -= lr * gradients[row] / (math.sqrt(squares) + 1e-8)
            else:
                alone.grad = gradients[row]
                reference.param_groups[0]["lr"] = lr
                reference.step()
        torch.testing.assert_close(got[row], alone.data, rtol=1e-11, atol=1e-13)


def test_lazy_leaves_untouched_rows_alone():
    optimizer = build(6, 3, mode="lazy")
    optimizer.fill(0, torch.ones(6, 3))
    ids = torch.tensor([1, 4])
    optimizer.update(ids, torch.ones(2, 3), 0.1)
    optimizer.end(0.1)
    before = {name: table.clone() for name, table in optimizer.tables().items()}
    for _ in range(20):
        optimizer.begin(torch.tensor([0]))
        optimizer.update(torch.tensor([0]), torch.ones(1, 3), 0.1)
        optimizer.end(0.1)
    optimizer.finish()
    for name, table in optimizer.tables().items():
        assert torch.equal(table[1:], before[name][1:])


@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_a_rare_row_of_adamw_moves_by_the_learning_rate(mode):
    """Whatever the gap; torch's AdamW, dense, moves it up to thirty times as far."""
    lr = 1e-3
    for gap in (1, 10, 100, 1000, 5000):
        optimizer = build(
            1, 8, optimizer="adamw", mode=mode, weight_decay=0.0, compute=torch.float64
        )
        signs = torch.tensor([[1.0, -1.0] * 4], dtype=torch.float64)
        places = [optimizer.rows(slice(None)).clone()]
        for step in range(4 * gap):
            if step % gap == 0:
                optimizer.begin(slice(None))
                optimizer.update(slice(None), signs, lr)
            optimizer.end(lr)
            if step % gap == gap - 1:
                places.append(optimizer.rows(slice(None)).clone())
        for before, after in itertools.pairwise(places):
            torch.testing.assert_close(after - before, -lr * signs, rtol=1e-4, atol=0)


def test_a_skipped_step_changes_nothing():
    start, steps = start_rows(12, 3), list(visits(60, 12, 3))
    plain = run(build(12, 3, mode="exact", compute=torch.float64), start, steps)
    optimizer = build(12, 3, mode="exact", compute=torch.float64)
    optimizer.fill(0, start)
    for ids, gradients, lr in steps:
        optimizer.begin(torch.arange(0, 12, 3))  # its gradients were not finite: neither update
        optimizer.begin(ids)  # nor end
        optimizer.update(ids, gradients[ids], lr)
        optimizer.end(lr)
    optimizer.finish()
    torch.testing.assert_close(optimizer.rows(slice(None)), plain, rtol=1e-11, atol=1e-13)


# --- how far behind a row can be ------------------------------------------------------------------


@pytest.mark.parametrize("first_row", [0, 5])
def test_no_row_is_further_behind_than_the_horizon(monkeypatch, first_row):
    monkeypatch.setattr(catch_up_module, "HORIZON", 7)
    monkeypatch.setattr(catch_up_module, "NEIGHBOURS", 2)
    start = start_rows(17, 3)
    optimizer = build(17, 3, mode="exact", weight_decay=0.05, compute=torch.float64)
    optimizer.first_row = first_row
    steps = list(visits(100, 17, 3))
    optimizer.fill(0, start)
    for ids, gradients, lr in steps:
        optimizer.begin(ids)
        optimizer.update(ids, gradients[ids], lr)
        optimizer.end(lr)
        ages = int(optimizer.history()["step"]) - optimizer.tables()["last_step"]
        assert 0 <= int(ages.min()) and int(ages.max()) < 7
    optimizer.finish()
    monkeypatch.undo()
    expected = run(
        build(17, 3, mode="exact", weight_decay=0.05, compute=torch.float64), start, steps
    )
    torch.testing.assert_close(optimizer.rows(slice(None)), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("first_row", "num_rows"), [(0, 17), (5, 17), (64, 1000), (100, 0), (3, 1)]
)
def test_each_row_is_due_once_a_horizon(monkeypatch, first_row, num_rows):
    monkeypatch.setattr(catch_up_module, "HORIZON", 7)
    due = [catch_up_module.due_rows(step, first_row, num_rows) for step in range(30, 37)]
    assert torch.cat(due).sort().values.tolist() == list(range(num_rows))
    for step, rows in enumerate(due, 30):
        assert all((row + first_row) // 64 % 7 == step % 7 for row in rows.tolist())


def test_gaps_of_thousands_of_steps():
    """Momentum of a row that no step touches again ends after lr m / (1 - momentum)."""
    optimizer = build(3, 2, mode="exact", weight_decay=0.0, compute=torch.float64)
    ids = torch.tensor([1])
    optimizer.begin(ids)
    optimizer.update(ids, torch.ones(1, 2, dtype=torch.float64), 0.1)
    for _ in range(catch_up_module.HORIZON + 100):
        optimizer.end(0.1)
    optimizer.finish()
    rows, momentum = optimizer.rows(slice(None)), optimizer.tables()["momentum"]
    torch.testing.assert_close(rows[1], torch.full((2,), -1.0, dtype=torch.float64))
    assert torch.equal(rows[[0, 2]], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(momentum, torch.zeros_like(momentum))


# --- stochastic rounding ----------------------------------------------------------------------


def draw(ids, step=0, stream=0, dim=16, seed=3, first_row=0):
    noise = RoundingNoise(seed, dim, first_row, CPU)
    count = len(ids) if isinstance(ids, torch.Tensor) else ids.stop - ids.start
    room = torch.empty(count, dim, dtype=torch.int32)
    return noise.draw(noise.keys(ids, step, stream), room)


def test_noise_depends_on_nothing_but_its_key():
    whole = draw(slice(0, 100))
    assert torch.equal(whole[30:], draw(slice(30, 100)))
    assert torch.equal(whole[30:], draw(slice(0, 70), first_row=30))
    ids = torch.tensor([99, 3, 50])
    assert torch.equal(whole[ids], draw(ids))
    assert torch.equal(whole[:, :7], draw(slice(0, 100), dim=7))
    others = [draw(slice(0, 100), **k) for k in ({"step": 1}, {"stream": 1}, {"seed": 4})]
    for other in others:
        assert (whole == other).double().mean() < 0.01


def test_noise_is_uniform_and_uncorrelated():
    noise = torch.stack([draw(slice(0, 64), step=s, dim=64) for s in range(64)])
    assert int(noise.min()) >= 0 and int(noise.max()) < 2**16
    counts = torch.bincount((noise >> 10).flatten(), minlength=64).double()  # 64 cells
    expected = noise.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 63) < 6 * math.sqrt(2 * 63)
    centred = (noise.double() - 32767.5) / (65536 / math.sqrt(12))  # (steps, rows, columns)
    limit = 6 / math.sqrt(64 * 64)
    for axis in range(3):
        flat = centred.movedim(axis, 0).flatten(1)  # each step, row or column with every other
        correlation = flat @ flat.T / flat.shape[1]
        assert (correlation - torch.eye(64)).abs().max() < 1.2 * limit


def test_rounding_keeps_the_mean_and_goes_to_a_neighbour():
    values = torch.cat([start_rows(4, 16, torch.float32), torch.tensor([[0.0, -0.0] * 8])])
    values[3] *= 1e-30
    low_bits = values.view(torch.int32) & -(2**16)
    low = low_bits.view(torch.float32)
    high = (low_bits + 2**16).view(torch.float32)  # away from zero
    total, steps = torch.zeros(5, 16, dtype=torch.float64), 4000
    for step in range(steps):
        got = round_stochastically(values.clone(), draw(slice(0, 5), step=step))
        assert torch.equal(got, got.bfloat16().float())
        assert bool(((got == low) | (got == high)).all())
        total += got
    error = (total / steps - values.double()).abs() / (high - low).double().abs()
    assert float(error.max()) < 5 * 0.5 / math.sqrt(steps)
    assert torch.equal(got[4], values[4])
    stored = values.bfloat16().float()
    assert torch.equal(round_stochastically(stored.clone(), draw(slice(0, 5))), stored)


def test_bfloat16_rows_follow_steps_far_below_their_spacing():
    """Rounded to the nearest, a row at 1 would never move by 1e-4: the spacing there is 4e-3."""
    optimizer = build(200, 16, seed=5, dtype="bfloat16", momentum=0.0, weight_decay=0.0)
    optimizer.fill(0, torch.ones(200, 16))
    for _ in range(300):
        optimizer.update(slice(None), torch.ones(200, 16), 1e-4)
        optimizer.end(1e-4)
    moved = 1 - optimizer.rows(slice(None)).double()
    assert optimizer.tables()["rows"].dtype == torch.bfloat16
    assert abs(float(moved.mean()) - 0.03) < 3e-4


# --- parts, checkpoints, host memory -----------------------------------------------------------

DIM = 16  # whole vectors of a CPU: torch's fused SGD rounds the numbers left over otherwise
KINDS = [
    {"optimizer": name, "mode": mode, "dtype": dtype, "momentum_dtype": dtype}
    for name in ("sgd", "adamw", "adagrad")
    for mode in ("lazy", "exact")
    for dtype in ("float32", "bfloat16")
]


def kind_name(kind):
    return "-".join(list(kind.values())[:3])


def parts_of(num_rows, world_size):
    edges = [num_rows * i // world_size for i in range(world_size + 1)]
    return list(itertools.pairwise(edges))


def cut(optimizers, num_rows, world_size, kind, **fields):
    """The state of some parts, loaded by `world_size` others."""
    whole = {
        name: torch.cat([o.tables()[name] for o in optimizers]) for name in optimizers[0].tables()
    }
    parts = []
    for start, stop in parts_of(num_rows, world_size):
        part = build(stop - start, DIM, first_row=start, weight_decay=0.05, **kind, **fields)
        tables = {name: table[start:stop] for name, table in whole.items()}
        part.load(tables, optimizers[-1].history())
        parts.append(part)
    return parts


def step_parts(parts, ids, gradients, lr):
    for part in parts:
        own = ids[(ids >= part.first_row) & (ids < part.first_row + part.num_rows)]
        part.begin(own - part.first_row)
        part.update(own - part.first_row, gradients[own], lr)
        part.end(lr)


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_cut_into_parts_it_goes_on_bit_identically(monkeypatch, kind):
    monkeypatch.setattr(catch_up_module, "HORIZON", 5)
    monkeypatch.setattr(catch_up_module, "NEIGHBOURS", 2)
    steps = list(visits(60, 10, DIM, dtype=torch.float32))
    one = cut([build(10, DIM, weight_decay=0.05, **kind)], 10, 1, kind)
    one[0].fill(0, start_rows(10, DIM, torch.float32))
    for step in steps[:25]:
        step_parts(one, *step)
    two, three, again = (cut(one, 10, w, kind) for w in (2, 3, 1))
    for step in steps[25:40]:
        for parts in (one, two, three, again):
            step_parts(parts, *step)
    mixed = cut(three, 10, 2, kind)
    for step in steps[40:]:
        for parts in (one, two, three, again, mixed):
            step_parts(parts, *step)
    for parts in (one, two, three, again, mixed):
        for part in parts:
            part.finish()
        for name, table in one[0].tables().items():
            assert torch.equal(torch.cat([p.tables()[name] for p in parts]), table), name
        for name, table in one[0].history().items():
            assert torch.equal(parts[0].history()[name], table), name


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_tiles_host_memory_and_ranges_change_nothing(monkeypatch, kind):
    steps = list(visits(30, 30, DIM, dtype=torch.float32))
    start = start_rows(30, DIM, torch.float32)
    whole = run(build(30, DIM, **kind), start, steps)
    assert torch.equal(run(build(30, DIM, host=True, **kind), start, steps), whole)
    monkeypatch.setitem(rows_module._TILE_BYTES, "cpu", 3 * DIM * 4)
    assert torch.equal(run(build(30, DIM, **kind), start, steps), whole)
    in_order = build(30, DIM, **kind)
    in_order.fill(0, start)
    for ids, gradients, lr in steps:
        if len(ids) == 30:
            in_order.begin(slice(None))
            assert torch.equal(in_order.rows(ids), in_order.rows(slice(0, 30)))
            in_order.update(slice(7, 30), gradients[7:], lr)
            in_order.update(slice(0, 7), gradients[:7], lr)
        else:
            in_order.begin(ids)
            in_order.update(ids.flip(0), gradients[ids.flip(0)], lr)
        in_order.end(lr)
    in_order.finish()
    assert torch.equal(in_order.rows(slice(None)), whole)


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_bytes_per_row_counts_the_tables(kind):
    optimizer = build(10, 12, **kind)
    config = CentersConfig(**{"mode": "lazy", **kind})
    num_bytes = sum(t.numel() * t.itemsize for t in optimizer.tables().values())
    assert num_bytes == 10 * SparseOptimizer.bytes_per_row(config, 12)
    assert all(len(table) == 10 for table in optimizer.tables().values())


def test_formula_of_the_readme():
    """4 bytes x d: bfloat16 rows and momentum; and 4, for the step that a row has come to."""
    config = CentersConfig(dtype="bfloat16", momentum_dtype="bfloat16")
    assert SparseOptimizer.bytes_per_row(config, 128) == 4 * 128 + 4
    lazy = config.model_copy(update={"mode": "lazy"})
    assert SparseOptimizer.bytes_per_row(lazy, 128) == 4 * 128


class Largest(TorchDispatchMode):
    """The most numbers that any operation made which are not part of a table."""

    def __init__(self, tables):
        super().__init__()
        self.storages = {table.untyped_storage().data_ptr() for table in tables}
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.storages:
                    self.numel = max(self.numel, storage.nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_nothing_is_larger_than_a_tile(monkeypatch, kind):
    """Beside one number a row, and what `rows()` hands out."""
    monkeypatch.setattr(catch_up_module, "HORIZON", 100)
    monkeypatch.setitem(rows_module._TILE_BYTES, "cpu", 25 * 64 * 4)
    optimizer = build(200, 64, weight_decay=0.1, norm_bounds=(1.0, 2.0), **kind)
    ids, gradients = torch.arange(0, 200, 2), torch.ones(200, 64)
    half = gradients[::2].contiguous()
    with Largest([*optimizer.tables().values(), gradients, half]) as largest:
        for _ in range(3):
            optimizer.begin(ids)
            optimizer.update(ids, half, 0.1)
            optimizer.end(0.1)
            optimizer.begin(slice(None))
            optimizer.update(slice(0, 200), gradients, 0.1)
            optimizer.end(0.1)
    assert 25 * 64 <= largest.numel <= 25 * 64 + 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_handed_out_in_the_dtype_of_computation(dtype):
    optimizer = build(10, 4, dtype=dtype)
    values = start_rows(10, 4, torch.float32).bfloat16().float()
    optimizer.fill(2, values[2:])
    for ids in (slice(2, 7), torch.tensor([9, 2]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(optimizer.rows(ids), values[ids])
    assert optimizer.rows(slice(None)).dtype == torch.float32
    view = build(10, 4).rows(slice(3, 5))
    assert view.shape == (2, 4) and view.untyped_storage().nbytes() == 10 * 4 * 4
    half = build(10, 4, compute=torch.bfloat16)
    assert half.tables()["rows"].dtype == torch.float32
    assert half.rows(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sgd", "adamw", "adagrad"])
def test_gradients_may_lie_anyhow_and_are_left_alone(name):
    gradients = start_rows(10, 4, torch.float32)
    expected, got, double = (build(10, 4, optimizer=name) for _ in range(3))
    expected.update(slice(None), gradients, 0.1)
    spread = torch.empty(4, 20)[:, ::2].copy_(gradients.T).T
    assert not spread.is_contiguous()
    got.update(slice(None), spread, 0.1)
    double.update(slice(None), gradients.double(), 0.1)
    assert torch.equal(spread, gradients)
    for other in (got, double):
        assert torch.equal(other.rows(slice(None)), expected.rows(slice(None)))


def test_fill_starts_rows_anew():
    optimizer = build(5, 3, mode="exact", optimizer="adamw", weight_decay=0.5)
    for _ in range(3):
        optimizer.begin(slice(None))
        optimizer.update(slice(None), torch.ones(5, 3), 0.1)
        optimizer.end(0.1)
    optimizer.fill(1, torch.full((2, 3), 7.0))
    optimizer.finish()
    tables = optimizer.tables()
    assert torch.equal(optimizer.rows(slice(1, 3)), torch.full((2, 3), 7.0))
    assert tables["row_steps"].tolist() == [3, 0, 0, 3, 3]
    assert not tables["moment1"][1:3].any() and tables["moment1"][0].all()


def test_a_part_may_be_empty():
    optimizer = build(0, 4, mode="exact", first_row=3)
    optimizer.fill(0, torch.empty(0, 4))
    optimizer.begin(torch.empty(0, dtype=torch.int64))
    optimizer.update(slice(0, 0), torch.empty(0, 4), 0.1)
    optimizer.end(0.1)
    optimizer.finish()
    assert optimizer.rows(slice(None)).shape == (0, 4)


# --- lengths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lengths_are_kept_in_bounds(dtype):
    optimizer = build(5, 64, dtype=dtype, momentum=0.0, weight_decay=0.0, norm_bounds=(0.5, 2.0))
    directions = nn.functional.normalize(start_rows(5, 64, torch.float32))
    lengths = torch.tensor([0.01, 0.0, 1.0, 30.0, 30.0])
    optimizer.fill(0, directions * lengths[:, None])
    before = optimizer.rows(slice(None)).clone()
    optimizer.update(slice(0, 4), torch.zeros(4, 64), 0.1)
    after = optimizer.rows(slice(None))
    spacing = 1e-6 if dtype == "float32" else 2**-7
    expected = torch.tensor([0.5, 0.0, 1.0, 2.0, 30.0])
    torch.testing.assert_close(after.norm(dim=1), expected, rtol=spacing, atol=1e-6)
    assert torch.equal(after[[1, 2, 4]], before[[1, 2, 4]])  # untouched, or within: bit for bit
    cosines = nn.functional.cosine_similarity(after, before)[[0, 3]]
    torch.testing.assert_close(cosines, torch.ones(2), rtol=spacing, atol=0)


# --- what is wrong is said ---------------------------------------------------------------------


def test_wrong_calls_are_named():
    optimizer = build(5, 3, mode="exact")
    with pytest.raises(ValueError, match="rows 4 to 6 of a part that has 5"):
        optimizer.fill(4, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"gradients \(2, 3\) for 3 rows of 3"):
        optimizer.update(slice(0, 3), torch.zeros(2, 3), 0.1)
    with pytest.raises(ValueError, match="stride"):
        optimizer.begin(slice(0, 5, 2))
    optimizer.end(0.1)
    with pytest.raises(RuntimeError, match="begin"):
        optimizer.update(slice(0, 3), torch.zeros(3, 3), 0.1)
    optimizer.begin(slice(None))
    optimizer.update(slice(0, 3), torch.zeros(3, 3), 0.1)
    with pytest.raises(RuntimeError, match="once"):
        optimizer.update(slice(2, 4), torch.zeros(2, 3), 0.1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"norm_bounds": (2.0, 1.0)}, "norm_bounds"),
        ({"norm_bounds": (-1.0, 1.0)}, "norm_bounds"),
        ({"norm_bounds": (math.nan, 1.0)}, "norm_bounds"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
    ],
)
def test_an_impossible_optimizer_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        CentersConfig(**fields)


def test_a_checkpoint_of_another_kind_is_named():
    sgd, adamw, lazy = build(5, 3, mode="exact"), build(5, 3, optimizer="adamw"), build(5, 3)
    with pytest.raises(ConfigError, match=r"last_step, momentum.*moment1.*centers\.optimizer"):
        adamw.load(sgd.tables(), sgd.history())
    with pytest.raises(ConfigError, match=r"some/step-1: tables last_step.*mode"):
        lazy.check_stored(sgd.tables(), "some/step-1")
    with pytest.raises(ConfigError, match="history"):
        lazy.load_history(sgd.history())
    with pytest.raises(ConfigError, match="history"):
        sgd.load_history(build(5, 3, mode="exact", momentum=0.0).history())
    with pytest.raises(ConfigError, match=r"rows of shape \(5, 3\), this part \(5, 4\)"):
        build(5, 4, mode="exact").load(sgd.tables(), sgd.history())


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_a_part_loaded_by_ranges_goes_on_bit_identically(kind):
    steps = list(visits(20, 10, DIM, dtype=torch.float32))
    first = build(10, DIM, weight_decay=0.05, **kind)
    first.fill(0, start_rows(10, DIM, torch.float32))
    step_parts([first], *steps[0])
    second = build(10, DIM, weight_decay=0.05, **kind)
    stored = {name: table.clone() for name, table in first.tables().items()}
    second.check_stored(stored)
    for name, table in second.tables().items():
        for start, stop in parts_of(10, 3):
            table[start:stop].copy_(stored[name][start:stop])
    second.load_history(first.history())
    for step in steps[1:]:
        step_parts([first], *step)
        step_parts([second], *step)
    for name, table in first.tables().items():
        assert torch.equal(second.tables()[name], table)


def test_a_checkpoint_of_another_dtype_is_converted():
    optimizer = build(5, 3)
    optimizer.fill(0, start_rows(5, 3, torch.float32))
    half = build(5, 3, dtype="bfloat16", momentum_dtype="bfloat16")
    half.load(optimizer.tables(), optimizer.history())
    assert torch.equal(half.tables()["rows"], optimizer.tables()["rows"].bfloat16())


# --- a GPU -------------------------------------------------------------------------------------


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_a_gpu_gives_the_same(kind, host):
    steps = list(visits(30, 300, 32, dtype=torch.float32))
    start = start_rows(300, 32, torch.float32)
    expected = run(build(300, 32, seed=2, **kind), start, steps)
    cuda = torch.device("cuda", 0)
    optimizer = build(300, 32, seed=2, device=cuda, host=host, **kind)
    on_gpu = [(ids.cuda(), gradients.cuda(), lr) for ids, gradients, lr in steps]
    got = run(optimizer, start.cuda(), on_gpu)
    assert got.device.type == "cuda"
    assert optimizer.tables()["rows"].is_pinned() == host
    spacing = 1e-4 if kind["dtype"] == "float32" else 0.05
    torch.testing.assert_close(got.cpu(), expected, rtol=spacing, atol=spacing)


@GPU
@pytest.mark.gpu
def test_noise_on_a_gpu_is_the_same_bits():
    noise = RoundingNoise(3, 16, 0, torch.device("cuda", 0))
    room = torch.empty(100, 16, dtype=torch.int32, device="cuda")
    got = noise.draw(noise.keys(slice(0, 100), 0, 0), room)
    assert torch.equal(got.cpu(), draw(slice(0, 100)))
