import math
from pathlib import Path

import pytest
import torch

from trainer.config import Config, ModelConfig, OptimConfig
from trainer.models import build_model
from trainer.momentum_sgd import MomentumSGD
from trainer.optim import build_optimizer, decayed_names, parameter_groups

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
TINY = str(MODELS / "tiny_vit_32.json")
CONVNEXT = str(MODELS / "small_convnext_64.json")
CPU = torch.device("cpu")

BLOCK = [f"transformer.resblocks.{i}." for i in range(2)]
BLOCK_KERNELS = [
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
]
KERNELS = {
    *(
        f"clip.{side}{block}{leaf}"
        for side in ("visual.", "")
        for block in BLOCK
        for leaf in BLOCK_KERNELS
    ),
    "clip.visual.conv1.weight",
    "clip.visual.proj",
    "clip.text_projection",
}
TABLES = {
    "clip.visual.positional_embedding",
    "clip.positional_embedding",
    "clip.token_embedding.weight",
}


def tiny(loss_name="siglip", **fields):
    return build_model(ModelConfig(name=TINY, **fields), loss_name=loss_name)


def by_name(groups, key):
    return {name: group[key] for group in groups for name in group["names"]}


def test_decay_sets_of_a_vit_by_name():
    model = tiny()
    assert decayed_names(model, "open_clip") == KERNELS | TABLES
    assert decayed_names(model, "ndim") == KERNELS | TABLES
    assert decayed_names(model, "big_vision") == KERNELS


def test_decay_sets_of_a_timm_tower():
    model = build_model(ModelConfig(name=CONVNEXT), loss_name="siglip", device="meta")
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    open_clip_rule = {
        n
        for n, p in model.named_parameters()
        if p.ndim >= 2 and not any(part in n for part in ("bn", "ln", "bias", "logit_scale"))
    }
    assert decayed_names(model, "ndim") == matrices
    assert decayed_names(model, "open_clip") == open_clip_rule
    kernels = decayed_names(model, "big_vision")
    assert matrices - kernels == {
        "clip.text.positional_embedding",
        "clip.text.token_embedding.weight",
    }


@pytest.mark.parametrize("decay_set", ["open_clip", "big_vision", "ndim"])
def test_every_trainable_parameter_is_in_one_group_and_scale_and_bias_never_decay(decay_set):
    model = tiny(lock_image=True, lock_image_unlocked_groups=2)
    groups = parameter_groups(model, OptimConfig(decay_set=decay_set, weight_decay=0.3))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert [id(parameters[n]) for n in group["names"]] == [id(p) for p in group["params"]]
    decay = by_name(groups, "weight_decay")
    assert decay["log_scale"] == decay["bias"] == 0.0
    assert {n for n, d in decay.items() if d} == decayed_names(model, decay_set) & set(names)
    assert set(decay.values()) == {0.0, 0.3}


def test_layer_decay_counts_from_the_output():
    groups = parameter_groups(tiny(), OptimConfig(layer_decay=0.5, lr=1e-3))
    scale = by_name(groups, "lr_scale")
    assert scale["log_scale"] == scale["bias"] == 1.0
    for side, table, projection, norm in (
        ("visual.", "conv1.weight", "proj", "ln_post.weight"),
        ("", "token_embedding.weight", "text_projection", "ln_final.bias"),
    ):
        assert scale[f"clip.{side}{projection}"] == 1.0
        assert scale[f"clip.{side}{norm}"] == 0.5
        assert scale[f"clip.{side}{BLOCK[1]}mlp.c_fc.weight"] == 0.5
        assert scale[f"clip.{side}{BLOCK[0]}attn.in_proj_bias"] == 0.25
        assert scale[f"clip.{side}positional_embedding"] == 0.125
        assert scale[f"clip.{side}{table}"] == 0.125
    lr = by_name(groups, "lr")
    assert all(lr[name] == 1e-3 * scale[name] for name in lr)


def test_layer_decay_of_a_timm_tower_falls_from_head_to_stem():
    model = build_model(ModelConfig(name=CONVNEXT), loss_name="clip", device="meta")
    scale = by_name(parameter_groups(model, OptimConfig(layer_decay=0.9)), "lr_scale")
    assert scale["clip.visual.head.proj.weight"] == 1.0
    order = [
        "clip.visual.trunk.stem.0.weight",
        "clip.visual.trunk.stages.0.blocks.0.mlp.fc1.weight",
        "clip.visual.trunk.stages.2.blocks.5.mlp.fc1.weight",
        "clip.visual.trunk.stages.3.blocks.1.mlp.fc1.weight",
        "clip.visual.head.proj.weight",
    ]
    found = [scale[name] for name in order]
    assert found == sorted(set(found))


def test_per_tower_learning_rates():
    groups = parameter_groups(tiny(), OptimConfig(lr=1e-3, image_lr=1e-4, text_lr=2e-3))
    lr = by_name(groups, "lr")
    for name, value in lr.items():
        tower = 1e-4 if name.startswith("clip.visual.") else 2e-3
        assert value == pytest.approx(1e-3 if name in ("log_scale", "bias") else tower, rel=1e-12)


def give_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_steps_as_its_formula_says():
    model = tiny()
    config = OptimConfig(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, layer_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    give_gradients(model)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer.step()
    groups = parameter_groups(model, config)
    lr, decay = by_name(groups, "lr"), by_name(groups, "weight_decay")
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.double()
        wanted = before[name] * (1 - lr[name] * decay[name]) - lr[name] * gradient / (
            gradient.abs() + 1e-6
        )
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=0, atol=1e-6)


def test_lamb_scales_each_decayed_matrix_by_its_trust_ratio():
    model = tiny("clip")
    config = OptimConfig(name="lamb", lr=1e-2, weight_decay=0.2)
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    give_gradients(model)
    weight = model.clip.visual.proj
    before = weight.detach().double()
    optimizer.step()
    gradient = weight.grad.double()
    update = gradient / (gradient.abs() + 1e-6) + 0.2 * before
    wanted = before - 1e-2 * before.norm() / update.norm() * update
    torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=1e-6)


def test_lamb_does_not_clip_on_its_own():
    updates = []
    for factor in (1.0, 1e4):
        model = tiny("clip")
        config = OptimConfig(name="lamb", lr=1e-2, eps=1e-12)
        optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
        give_gradients(model)
        for parameter in model.parameters():
            parameter.grad *= factor
        optimizer.step()
        moment = optimizer.state[model.clip.visual.proj]["exp_avg"]
        updates.append(float(moment.norm()))
    assert updates[1] / updates[0] == pytest.approx(1e4, rel=1e-4)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    model = tiny("clip")
    config = OptimConfig(name="muon", lr=1e-2, weight_decay=0.0)
    groups = parameter_groups(model, config)
    fallback = by_name(groups, "use_fallback")
    assert {name for name, left in fallback.items() if not left} == KERNELS
    optimizer = build_optimizer(groups, config, CPU)
    give_gradients(model)
    kernel = model.clip.visual.transformer.resblocks[0].mlp.c_fc.weight
    table = model.clip.token_embedding.weight
    before = kernel.detach().double(), table.detach().double()
    optimizer.step()
    singular = torch.linalg.svdvals(kernel.detach().double() - before[0])
    assert float(singular.max() / singular.min()) < 3  # Newton-Schulz stops near 1, not at it
    moved = (table.detach().double() - before[1]).abs()
    low, high = moved.flatten()[:100_000].quantile(torch.tensor([0.01, 0.99], dtype=torch.double))
    assert float(high / low) == pytest.approx(1, abs=0.01)  # Adam's first step: a sign's size


@pytest.mark.parametrize("name", ["lamb", "muon"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_per_matrix_optimizers_are_refused_where_zero_cuts_matrices(name, stage):
    fields = {"optim": {"name": name}, "zero": {"stage": stage}}
    with pytest.raises(ValueError, match=r"zero\.stage = 0"):
        Config.model_validate(fields)


def test_log_scale_moves_as_far_as_adam_lets_it():
    model = tiny("clip")
    config = OptimConfig(lr=1e-3)
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    model(None, torch.ones(2, model.context_length, dtype=torch.int64)).scale.sum().backward()
    optimizer.step()
    assert float(model.log_scale.detach()) == pytest.approx(math.log(1 / 0.07) - 1e-3, abs=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_momentum_sgd_is_torchs_bit_for_bit(nesterov, fused):
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(3)]
    runs = {}
    for kind in (torch.optim.SGD, MomentumSGD):
        tensors = [tensor.clone().requires_grad_() for tensor in start]
        groups = [{"params": tensors[:1]}, {"params": tensors[1:], "weight_decay": 0.0}]
        optimizer = kind(
            groups, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01, fused=fused
        )
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for tensor in tensors:
                tensor.grad = torch.randn(tensor.shape, generator=generator)
            tensors[1].grad = None if step == 2 else tensors[1].grad
            optimizer.step()
        runs[kind] = tensors
    for ours, theirs in zip(runs[MomentumSGD], runs[torch.optim.SGD], strict=True):
        assert torch.equal(ours, theirs)
