"""Face backbones against published counts, names and naive forwards; freezing and recomputing."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Config, ConfigError, ModelConfig, OptimConfig
from trainer.dropout import KeyedDropout, KeyedDropPath, make_dropout_keyed, row_keys, use_row_keys
from trainer.engine import Engine
from trainer.models import build_face_model
from trainer.models.backbones.prelu import BLOCK, PReLU
from trainer.models.layers import parameter_layers
from trainer.models.recompute import statistics_kept
from trainer.optim import build_optimizer, decayed_names, parameter_groups
from trainer.ranks import Ranks

SIZE = 32
NAMES = ["iresnet18", "resnet10", "mobilefacenet", "vit_t", "timm:test_vit", "timm:test_resnet"]
CPU = torch.device("cpu")


def config(name="mobilefacenet", **fields):
    return ModelConfig(**{"name": name, "image_size": SIZE, "embedding_dim": 24, **fields})


def build(name="mobilefacenet", *, seed=0, device="cpu", **fields):
    return build_face_model(config(name, **fields), seed=seed, device=device)


def pixels(n, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def unsettle(model, seed=1):
    """Move every weight and statistic away from its start; frozen scales too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model


# --- sizes -------------------------------------------------------------------------------------

# Parameters by hand from the published layer tables (insightface, recognition/arcface_torch);
# 10^9 multiply-adds of convolutions and matrices at 112 pixels (its table: 2.62, 4.48, 6.33, 12.12,
# 0.45, which count norms and activations too; transformers 1.5, 5.74, 11.42, 25.31).
PUBLISHED = {
    "iresnet18": (24_025_600, 2.61),
    "iresnet34": (34_139_328, 4.46),
    "iresnet50": (43_590_848, 6.31),
    "iresnet100": (65_156_160, 12.09),
    "mobilefacenet": (2_059_520, 0.4375),
    "vit_t": (19_137_792, 1.505),
    "vit_s": (76_023_296, 5.747),
    "vit_b": (113_833_472, 11.437),
    "vit_l": (255_684_352, 25.338),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_are_the_published(name):
    model = build_face_model(ModelConfig(name=name), device="meta").eval()
    parameters, giga = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = model(torch.empty(1, 3, 112, 112, dtype=torch.uint8, device="meta")).rows
    assert rows.shape == (1, 512)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, SIZE) for name in NAMES),
        ("iresnet18", 56),
        ("mobilefacenet", 50),
        ("timm:test_vit", 48),
    ],
)
def test_rows_are_float32_at_any_image_size(name, size):
    model = build(name, image_size=size).eval()
    assert model.image_size == (size, size)
    assert model.resize_mode == "squash"
    assert model.tokenizer_spec is None
    with torch.no_grad():
        rows = model(pixels(3, size)).rows
        assert rows.shape == (3, model.embed_dim) == (3, 24)
        assert rows.dtype == torch.float32
        assert not torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-3)
        one_by_one = torch.cat([model(image[None]).rows for image in pixels(3, size)])
    torch.testing.assert_close(rows, one_by_one, rtol=0, atol=1e-4 * float(rows.abs().max()))


def test_timm_models_bring_their_own_image_size():
    assert build("timm:test_vit", image_size=0).image_size == (160, 160)
    assert build_face_model(ModelConfig(name="iresnet18"), device="meta").image_size == (112, 112)


# --- a pure function of config and seed ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pure_function_of_config_and_seed(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, again, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
    assert any(
        not torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items()
    )
    assert one.training
    meta = build(name, device="meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


def test_initialisation_is_the_published():
    model = build_face_model(ModelConfig(name="iresnet18", image_size=32)).backbone.requires_grad_(
        False
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std() == pytest.approx(0.1, rel=0.1)
            assert float(module.weight.mean()) == pytest.approx(0, abs=0.01)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert torch.all(module.weight == 1)
            assert torch.all(module.bias == 0)
            assert module.eps == 1e-5
        if isinstance(module, nn.PReLU):
            assert torch.all(module.weight == 0.25)
    assert float(model.fc.weight.abs().max()) <= 1 / math.sqrt(model.fc.in_features)
    mobile = build("mobilefacenet").backbone.requires_grad_(False)
    weight = mobile.conv_sep.layers[0].weight  # (512, 256, 1, 1): fan out 512
    assert weight.std() == pytest.approx(math.sqrt(2 / 512), rel=0.02)


# --- naive forwards over published names ---------------------------------------------------------


def naive_norm(w, name, x):
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    shape = (1, -1) + (1,) * (x.ndim - 2)
    x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return x * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)


def naive_prelu(w, name, x):
    return x.clamp(min=0) + w[f"{name}.weight"].view(1, -1, 1, 1) * x.clamp(max=0)


def naive_iresnet(w, x, depths):
    """ArcFace's network in evaluation, written from its table."""
    x = naive_prelu(w, "prelu", naive_norm(w, "bn1", F.conv2d(x, w["conv1.weight"], padding=1)))
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            at, stride = f"layer{stage}.{block}", 2 if block == 0 else 1
            y = F.conv2d(naive_norm(w, f"{at}.bn1", x), w[f"{at}.conv1.weight"], padding=1)
            y = naive_prelu(w, f"{at}.prelu", naive_norm(w, f"{at}.bn2", y))
            y = F.conv2d(y, w[f"{at}.conv2.weight"], stride=stride, padding=1)
            if block == 0:
                x = F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=stride)
                x = naive_norm(w, f"{at}.downsample.1", x)
            x = x + naive_norm(w, f"{at}.bn3", y)
    x = naive_norm(w, "bn2", x).reshape(len(x), -1)
    return naive_norm(w, "features", x @ w["fc.weight"].T + w["fc.bias"])


def naive_mobilefacenet(w, x, depths):
    """insightface's table: (kind, where, stride) of convolutions, all 3 x 3 unless their weight."""

    def conv(at, x, stride=1, act=True):
        weight = w[f"{at}.0.weight"]
        groups = x.shape[1] // weight.shape[1]
        padding = weight.shape[2] // 2 if weight.shape[2] == 3 else 0
        x = naive_norm(w, f"{at}.1", F.conv2d(x, weight, None, stride, padding, 1, groups))
        return naive_prelu(w, f"{at}.2", x) if act else x

    def bottleneck(at, x, stride):
        y = conv(f"{at}.0.layers", x)
        return conv(f"{at}.2.layers", conv(f"{at}.1.layers", y, stride), act=False)

    def residuals(at, x, depth):
        for block in range(depth):
            x = x + bottleneck(f"{at}.{block}.layers", x, 1)
        return x

    x = conv("layers.1.layers", conv("layers.0.layers", x, 2))
    for i, depth in enumerate(depths[1:]):
        x = bottleneck(f"layers.{2 + 2 * i}.layers", x, 2)
        x = residuals(f"layers.{3 + 2 * i}.layers", x, depth)
    x = conv("features.layers.0.layers", conv("conv_sep.layers", x), act=False)
    return naive_norm(w, "features.layers.3", x.flatten(1) @ w["features.layers.2.weight"].T)


def naive_vit(w, x, depth):
    """insightface's transformer without its fused projections; heads and patches by loops."""

    def norm(at, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]

    def batch_norm(at, x):
        x = (x - w[f"{at}.running_mean"]) / (w[f"{at}.running_var"] + 2e-5).sqrt()
        return x * w[f"{at}.weight"] + w[f"{at}.bias"]

    kernel, size = w["patch_embed.proj.weight"], x.shape[2] // 9
    patches = [
        torch.einsum("nchw,dchw->nd", x[:, :, 9 * i : 9 * i + 9, 9 * j : 9 * j + 9], kernel)
        for i in range(size)
        for j in range(size)
    ]
    x = torch.stack(patches, 1) + w["patch_embed.proj.bias"] + w["pos_embed"]
    head = x.shape[2] // 8
    for block in range(depth):
        at = f"blocks.{block}"
        qkv = norm(f"{at}.norm1", x) @ w[f"{at}.attn.qkv.weight"].T
        outs = []
        for number in range(8):
            q, k, v = (
                part[..., number * head : (number + 1) * head] for part in qkv.chunk(3, dim=-1)
            )
            outs.append((q @ k.transpose(1, 2) / math.sqrt(head)).softmax(-1) @ v)
        x = x + torch.cat(outs, -1) @ w[f"{at}.attn.proj.weight"].T + w[f"{at}.attn.proj.bias"]
        y = norm(f"{at}.norm2", x) @ w[f"{at}.mlp.fc1.weight"].T + w[f"{at}.mlp.fc1.bias"]
        x = x + y.clamp(0, 6) @ w[f"{at}.mlp.fc2.weight"].T + w[f"{at}.mlp.fc2.bias"]
    x = norm("norm", x).reshape(len(x), -1) @ w["feature.0.weight"].T
    return batch_norm("feature.3", batch_norm("feature.1", x) @ w["feature.2.weight"].T)


@pytest.mark.parametrize(
    ("name", "naive", "depths"),
    [
        ("vit_t", naive_vit, 12),
        ("iresnet18", naive_iresnet, (2, 2, 2, 2)),
        ("mobilefacenet", naive_mobilefacenet, (1, 4, 6, 2)),
    ],
)
def test_forward_is_the_published_network(name, naive, depths):
    model = unsettle(build(name).double()).eval()
    images = pixels(2)
    with torch.no_grad():
        found = model(images).rows
        normalised = (images.double() / 255 - 0.5) / 0.5
        wanted = naive(dict(model.backbone.state_dict()), normalised, depths)
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-6)


@pytest.mark.parametrize(
    "name",
    ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "test_nfnet"],
)
def test_a_timm_backbone_is_timms_own_function_and_the_neck(name):
    model = unsettle(build(f"timm:{name}", image_size=64)).eval()
    images = pixels(2, 64)
    with torch.no_grad():
        raw = model.backbone.trunk((images.float() / 255 - 0.5) / 0.5)
        wanted = F.batch_norm(
            raw,
            model.backbone.neck.running_mean,
            model.backbone.neck.running_var,
            model.backbone.neck.weight,
            model.backbone.neck.bias,
        )
        torch.testing.assert_close(model(images).rows, wanted, rtol=1e-4, atol=1e-4)
    bare = build(f"timm:{name}", image_size=64, bn_neck=False)
    assert not any("neck" in key for key in bare.state_dict())


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fp32_head", [True, False])
def test_the_heads_precision_under_autocast(name, fp32_head):
    model = build(name, fp32_head=fp32_head)
    seen = []
    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.BatchNorm1d))][-2:]
    for module in last:
        module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model(pixels(4)).rows
    assert rows.dtype == torch.float32
    wanted = torch.float32 if fp32_head else torch.bfloat16
    assert {out for _, out in seen} == {wanted}
    with torch.no_grad():
        exact = model.eval()(pixels(4)).rows
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(pixels(4)).rows
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_last_scale_is_frozen_at_one_unless_told(name):
    def last_norm(model):
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)][-1]

    frozen = last_norm(build(name))
    assert not frozen.weight.requires_grad
    assert torch.all(frozen.weight == 1)
    assert frozen.bias.requires_grad
    assert last_norm(build(name, freeze_last_bn_scale=False)).weight.requires_grad
    model = build(name)
    model(pixels(4))
    assert last_norm(model).num_batches_tracked == 1  # its statistics move all the same


@pytest.mark.parametrize("name", NAMES)
def test_dropout_becomes_keyed(name):
    model = build(name, dropout=0.5)
    make_dropout_keyed(model)
    keyed = [m for m in model.modules() if isinstance(m, KeyedDropout)]
    assert len(keyed) == 1
    assert not any(type(m) is nn.Dropout and m.p > 0 for m in model.modules())
    with pytest.raises(ValueError, match="row keys"):
        model(pixels(4))
    rows = []
    for seed in (1, 1, 2):
        use_row_keys(model, row_keys(seed, torch.arange(4)))
        rows.append(model(pixels(4)).rows)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_patches_left_out_of_a_vit_are_keyed_and_stood_for():
    model = build("vit_t", patch_dropout=0.5, image_size=36)
    make_dropout_keyed(model)
    lengths = []
    model.backbone.blocks[0].register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape)
    )
    with pytest.raises(ValueError, match="row keys"):
        model(pixels(4, 36))
    keys = row_keys(3, torch.arange(4))
    use_row_keys(model, keys)
    tokens = model.backbone.forward_features(pixels(4, 36).float())
    assert lengths == [(4, 8, 256)]
    masked = (tokens == model.backbone.mask_token).all(-1)
    assert masked.sum(1).tolist() == [8] * 4
    tokens.sum().backward()
    assert float(model.backbone.mask_token.grad.abs().sum()) > 0
    use_row_keys(model, keys[2:])  # the same patches of the same samples in another chunk
    again = model.backbone.forward_features(pixels(4, 36)[2:].float())
    torch.testing.assert_close(again, tokens[2:], rtol=1e-4, atol=1e-4)
    assert not build("vit_t").backbone.mask_token.requires_grad
    assert model.eval().backbone.forward_features(pixels(1, 36).float()).shape == (1, 16, 256)


def test_stochastic_depth_of_a_timm_model_is_keyed():
    model = build("timm:test_vit", drop_path=0.5, patch_dropout=0.25)
    make_dropout_keyed(model)
    kinds = {type(m).__name__ for m in model.modules()}
    assert KeyedDropPath.__name__ in kinds
    assert "KeyedPatchDropout" in kinds


def test_a_compiled_backbone_is_the_same_function(monkeypatch):
    calls = []

    def compile_eagerly(function):
        return lambda *args: calls.append(function) or function(*args)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain, compiled = build().eval(), build(compile=True).eval()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(compiled(pixels(2)).rows, plain(pixels(2)).rows)
    assert len(calls) == 1


# --- recomputed activations ----------------------------------------------------------------------


def step(name, **fields):
    """Gradients and buffers after one training pass; rows too."""
    model = build(name, **fields)
    make_dropout_keyed(model)
    use_row_keys(model, row_keys(7, torch.arange(4)))
    rows = model(pixels(4)).rows
    (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return rows.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("name", [*NAMES, "timm:test_efficientnet"])
def test_recomputing_changes_nothing_and_moves_statistics_once(name):
    drop_path = 0.5 if name in ("vit_t", "timm:test_vit", "timm:test_resnet") else 0.0
    rows, gradients, buffers = step(name, drop_path=drop_path)
    again = step(name, drop_path=drop_path, grad_checkpointing=True)
    assert torch.equal(again[0], rows)
    assert gradients.keys() == again[1].keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(again[1][key], gradient, rtol=1e-5, atol=1e-6, msg=key)
    assert buffers.keys() == again[2].keys()
    for key, buffer in buffers.items():
        assert torch.equal(again[2][key], buffer), key
    counts = [buffer for key, buffer in again[2].items() if "num_batches" in key]
    assert counts
    assert all(count == 1 for count in counts)


def test_recomputing_saves_less():
    def saved_bytes(**fields):
        model, total, seen = build("iresnet18", **fields), 0, set()

        def pack(tensor):
            nonlocal total
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
            return tensor

        weights = {p.data_ptr() for p in model.parameters()}
        seen |= weights
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pixels(4))
        return total

    assert saved_bytes(grad_checkpointing=True) < 0.5 * saved_bytes()


def test_statistics_are_kept_inside_and_move_outside():
    model = build("mobilefacenet")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with statistics_kept(model):
        inside = model(pixels(4)).rows
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    outside = model(pixels(4)).rows
    assert torch.equal(inside, outside)
    assert any(not torch.equal(b, before[name]) for name, b in model.named_buffers())


# --- PReLU ---------------------------------------------------------------------------------------


def prelu_gradients(layer, x, seed=0):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    outgoing = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    layer.weight.grad = None
    y.backward(outgoing)
    return y.detach(), x.grad, layer.weight.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (2, 64, 33, 17), (3, 8, 1, 1)])
def test_prelu_is_torchs(shape, dtype):
    ours, torchs = PReLU(shape[1]).to(dtype), nn.PReLU(shape[1]).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(-0.5, 0.7, shape[1]))
        torchs.weight.copy_(ours.weight)
    for layout in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        x[0, 0, 0, 0] = 0.0
        found, wanted = prelu_gradients(ours, x), prelu_gradients(torchs, x)
        assert torch.equal(found[0], wanted[0])
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for one, other in zip(found[1:], wanted[1:], strict=True):
            scale = float(other.abs().max()) + 1e-6
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def test_prelu_of_several_blocks_of_rows_and_of_other_gradient_layouts():
    layer = PReLU(16).double()
    x = torch.randn(2, 16, 60, 60, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    assert x.numel() > BLOCK
    y, x_gradient, weight_gradient = prelu_gradients(layer, x)
    outgoing = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(x_gradient, torch.where(x > 0, outgoing, 0.25 * outgoing))
    wanted = (outgoing * x.clamp(max=0)).sum((0, 2, 3))
    torch.testing.assert_close(weight_gradient, wanted)
    small = torch.randn(2, 4, 3, 3, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    assert torch.autograd.gradcheck(PReLU(4).double(), small.requires_grad_())


def test_prelu_under_autocast_keeps_bfloat16():
    layer, x = PReLU(4), torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.contiguous(memory_format=torch.channels_last).requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_grouped_convolutions_on_a_cpu_are_float32_inside_and_bfloat16_outside():
    model = build("mobilefacenet")
    grouped = [m for m in model.modules() if type(m).__name__ == "_GroupedConv2d"]
    assert len(grouped) == 4  # 64 groups of two channels, and the three strided ones
    seen = []
    for module in grouped:
        module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pixels(2)).rows.sum().backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 4
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


# --- published weights ---------------------------------------------------------------------------


def norm_shapes(name, channels):
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in vectors} | {f"{name}.num_batches_tracked": ()}


def insightface_iresnet(depths, d, size):
    """Names and shapes of the published state dict, from the published architecture."""
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,), **norm_shapes("bn1", 64)}
    width = 64
    for stage, (depth, channels) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
        for block in range(depth):
            at = f"layer{stage}.{block}"
            shapes |= norm_shapes(f"{at}.bn1", width)
            shapes[f"{at}.conv1.weight"] = (channels, width, 3, 3)
            shapes |= norm_shapes(f"{at}.bn2", channels)
            shapes[f"{at}.prelu.weight"] = (channels,)
            shapes[f"{at}.conv2.weight"] = (channels, channels, 3, 3)
            shapes |= norm_shapes(f"{at}.bn3", channels)
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (channels, width, 1, 1)
                shapes |= norm_shapes(f"{at}.downsample.1", channels)
            width = channels
    shapes |= norm_shapes("bn2", 512)
    shapes |= {"fc.weight": (d, 512 * (size // 16) ** 2), "fc.bias": (d,)}
    return shapes | norm_shapes("features", d)


def insightface_mobilefacenet(depths, d, size):
    def conv(at, in_channels, channels, kernel, groups=1, act=True):
        shapes = {f"{at}.layers.0.weight": (channels, in_channels // groups, kernel, kernel)}
        shapes |= norm_shapes(f"{at}.layers.1", channels)
        return shapes | ({f"{at}.layers.2.weight": (channels,)} if act else {})

    def bottleneck(at, in_channels, channels, wide):
        return (
            conv(f"{at}.layers.0", in_channels, wide, 1)
            | conv(f"{at}.layers.1", wide, wide, 3, wide)
            | conv(f"{at}.layers.2", wide, channels, 1, act=False)
        )

    shapes = conv("layers.0", 3, 128, 3) | conv("layers.1", 128, 128, 3, 64)
    for at, depth, before, channels, wide, inside in (
        (2, depths[1], 128, 128, 128, 128),
        (4, depths[2], 128, 256, 256, 256),
        (6, depths[3], 256, 256, 512, 256),
    ):
        shapes |= bottleneck(f"layers.{at}", before, channels, wide)
        for block in range(depth):
            shapes |= bottleneck(f"layers.{at + 1}.layers.{block}", channels, channels, inside)
    shapes |= conv("conv_sep", 256, 512, 1)
    shapes |= conv("features.layers.0", 512, 512, size // 16, 512, act=False)
    shapes["features.layers.2.weight"] = (d, 512)
    return shapes | norm_shapes("features.layers.3", d)


def insightface_vit(width, depth, d, size):
    patches = (size // 9) ** 2
    shapes = {
        "pos_embed": (1, patches, width),
        "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, 9, 9),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "feature.0.weight": (width, width * patches),
        "feature.2.weight": (d, width),
        **norm_shapes("feature.1", width),
        **norm_shapes("feature.3", d),
    }
    for block in range(depth):
        at = f"blocks.{block}"
        shapes[f"{at}.attn.qkv.weight"] = (3 * width, width)
        for leaf, rows, columns in (
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{at}.{leaf}.weight": (rows, columns), f"{at}.{leaf}.bias": (rows,)}
        for leaf in ("norm1", "norm2"):
            shapes |= {f"{at}.{leaf}.weight": (width,), f"{at}.{leaf}.bias": (width,)}
    return shapes


def made_up(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.tensor(17) if shape == () else torch.rand(shape, generator=generator)
        for name, shape in shapes.items()
    }


MADE_UP = {
    "iresnet18": insightface_iresnet((2, 2, 2, 2), 24, SIZE),
    "mobilefacenet": insightface_mobilefacenet((1, 4, 6, 2), 24, SIZE),
    "vit_t": insightface_vit(256, 12, 24, SIZE),
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("iresnet50", insightface_iresnet((3, 4, 14, 3), 512, 112)),
        ("iresnet100", insightface_iresnet((3, 13, 30, 3), 512, 112)),
        ("mobilefacenet", insightface_mobilefacenet((1, 4, 6, 2), 512, 112)),
        ("vit_b", insightface_vit(512, 24, 512, 112)),
    ],
)
def test_published_names_and_shapes_at_full_size(name, wanted):
    model = build_face_model(ModelConfig(name=name), device="meta")
    found = {name: tuple(tensor.shape) for name, tensor in model.backbone.state_dict().items()}
    assert found == wanted


@pytest.mark.parametrize("name", MADE_UP)
@pytest.mark.parametrize("form", ["pth", "module", "checkpoint", "safetensors", "no counters"])
def test_published_weights_load(tmp_path, name, form):
    weights = made_up(MADE_UP[name])
    path = tmp_path / f"backbone.{'safetensors' if form == 'safetensors' else 'pth'}"
    saved = dict(weights)
    if form == "module":
        saved = {f"module.{key}": tensor for key, tensor in weights.items()}
    if form == "checkpoint":  # as insightface's checkpoint_gpu_0.pt
        saved = {"epoch": 3, "state_dict_backbone": {f"module.{k}": t for k, t in weights.items()}}
    if form == "no counters":
        saved = {key: t for key, t in weights.items() if "num_batches" not in key}
    save_file(saved, path) if form == "safetensors" else torch.save(saved, path)
    model = build(name, pretrained=str(path))
    for key, tensor in model.backbone.state_dict().items():
        if "num_batches" not in key or form != "no counters":
            assert torch.equal(tensor, weights[key]), key
    assert model.training
    fresh = build_face_model(config(name, pretrained=str(path)), load_weights=False)
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown", "other dim", "other size"])
def test_weights_of_another_network_are_one_error_that_names_the_tensor(tmp_path, damage):
    weights, fields, named = made_up(MADE_UP["iresnet18"]), {}, "layer2.1.prelu.weight"
    if damage == "missing":
        del weights[named]
    if damage == "shape":
        weights[named] = torch.zeros(64)
    if damage == "unknown":
        named = "layer5.0.conv1.weight"
        weights[named] = torch.zeros(1)
    if damage == "other dim":
        fields, named = {"embedding_dim": 16}, "fc.bias (24,) instead of (16,) and 5 more"
    if damage == "other size":
        fields, named = {"image_size": 48}, "fc.weight (24, 2048) instead of (24, 4608)"
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ConfigError) as error:
        build("iresnet18", pretrained=str(tmp_path / "w.pt"), **fields)
    assert named in str(error.value)
    assert "iresnet18" in str(error.value)
    assert "\n" not in str(error.value)


class NotATensor:
    pass


@pytest.mark.parametrize("kind", ["absent", "pickle", "garbage", "list", "suffix", "empty"])
def test_a_file_that_holds_no_weights_is_one_error(tmp_path, kind):
    path = tmp_path / ("w.onnx" if kind == "suffix" else "w.pt")
    if kind == "pickle":
        torch.save({"conv1.weight": NotATensor()}, path)
    elif kind in ("garbage", "suffix"):
        path.write_bytes(b"no weights at all")
    elif kind in ("list", "empty"):
        torch.save([1, 2] if kind == "list" else {}, path)
    with pytest.raises(ConfigError, match=r"model\.pretrained") as error:
        build("iresnet18", pretrained=str(path))
    assert str(path) in str(error.value)


def test_our_own_names_load_too(tmp_path):
    model = unsettle(build("mobilefacenet"))
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    again = build("mobilefacenet", seed=9, pretrained=str(tmp_path / "ours.pt"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_a_timm_checkpoint_loads_but_for_its_classifier_and_our_neck(tmp_path, caplog):
    import timm

    published = unsettle(timm.create_model("test_resnet", num_classes=1000))
    save_file(published.state_dict(), tmp_path / "timm.safetensors")
    fields = {"pretrained": str(tmp_path / "timm.safetensors")}
    model = build("timm:test_resnet", **fields)
    for key, tensor in model.backbone.trunk.state_dict().items():
        assert torch.equal(tensor, published.state_dict()[key]) == (not key.startswith("fc.")), key
    assert "trunk.fc.weight" in caplog.text
    own = unsettle(build("timm:test_resnet", seed=2))
    torch.save(own.backbone.state_dict(), tmp_path / "own.pt")
    again = build("timm:test_resnet", pretrained=str(tmp_path / "own.pt"))
    for key, tensor in own.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with pytest.raises(ConfigError, match="trunk"):
        build("timm:test_vit", **fields)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "iresnet51"}, r"iresnet51.*nearest: iresnet50"),
        ({"name": "timm:resnet18x"}, r"nearest: timm:resnet18"),
        ({"name": "ViT-B-32"}, r"no face backbone"),
        ({"image_size": 8}, r"model\.image_size = 8.*at least 16"),
        ({"drop_path": 0.1}, r"model\.drop_path is for transformers"),
        ({"patch_dropout": 0.1}, r"model\.patch_dropout is for transformers"),
        ({"name": "timm:test_resnet", "patch_dropout": 0.1}, r"model\.patch_dropout: timm's"),
        ({"name": "timm:levit_128s"}, "has no single last layer"),
        ({"name": "timm:test_vit", "image_size": 56}, r"image_size 56: .*patch size"),
        ({"lock_image": True}, r"model\.lock_image is for image and text towers"),
        ({"init": "big_vision"}, r"model\.init"),
        ({"grad_checkpointing": True, "compile": True}, r"model\.compile"),
        ({"name": "timm:test_nfnet", "grad_checkpointing": True, "image_size": 0}, None),
    ],
)
def test_bad_configurations_are_one_error(fields, words):
    if words is None:  # a model that can is no error
        build(**fields)
        return
    with pytest.raises(ConfigError, match=words) as error:
        build_face_model(config(**fields), device="meta")
    assert "\n" not in str(error.value)


def test_floats_are_no_pixels_and_one_image_is_no_batch():
    model = build()
    with pytest.raises(TypeError, match="uint8"):
        model(pixels(2).float())
    with pytest.raises(ConfigError, match="single image"):
        model(pixels(1))
    assert model.eval()(pixels(1)).rows.shape == (1, 24)


# --- optimizer groups ----------------------------------------------------------------------------


def by_name(groups, key):
    return {name: group[key] for group in groups for name in group["names"]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay_set", ["open_clip", "big_vision", "ndim", "all"])
def test_every_trainable_parameter_is_in_one_group(name, decay_set):
    model = build(name)
    groups = parameter_groups(model, OptimConfig(decay_set=decay_set, weight_decay=5e-4))
    decay = by_name(groups, "weight_decay")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == trainable
    assert sum(len(group["names"]) for group in groups) == len(trainable)
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    if decay_set == "big_vision":
        tables = ("pos_embed", "cls_token", "mask_token")
        matrices = {n for n in matrices if not n.endswith(tables)}
    wanted = trainable if decay_set == "all" else matrices & trainable
    assert {n for n, d in decay.items() if d} == wanted
    assert decayed_names(model, decay_set) >= wanted
    assert set(decay.values()) <= {0.0, 5e-4}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("iresnet18", ["conv1", "layer1.1.bn1", "layer2.0.conv2", "layer4.1.prelu", "fc"]),
        ("mobilefacenet", ["layers.0", "layers.3.layers.2", "layers.7", "conv_sep", "features"]),
        ("vit_t", ["patch_embed", "blocks.0", "blocks.11", "feature"]),
        ("timm:test_vit", ["trunk.patch_embed", "trunk.blocks.1", "trunk.blocks.5", "trunk.head"]),
        ("timm:test_resnet", ["trunk.conv1", "trunk.layer1.0", "trunk.layer4.0", "neck"]),
    ],
)
def test_layer_decay_falls_from_the_last_layer_to_the_stem(name, order):
    model = build(name)
    scale = by_name(parameter_groups(model, OptimConfig(layer_decay=0.5)), "lr_scale")
    found = [next(s for n, s in scale.items() if n.startswith(f"backbone.{at}")) for at in order]
    assert found == sorted(set(found))
    assert found[-1] == 1.0
    assert set(parameter_layers(model)) == {n for n, _ in model.named_parameters()}
    assert set(by_name(parameter_groups(model, OptimConfig()), "lr_scale").values()) == {1.0}


def test_layer_decay_where_timm_cannot_say_is_an_error(monkeypatch):
    model = build("timm:test_resnet")
    monkeypatch.delattr(type(model.backbone.trunk), "group_matcher")
    assert parameter_groups(model, OptimConfig())
    with pytest.raises(ConfigError, match=r"optim\.layer_decay"):
        parameter_groups(model, OptimConfig(layer_decay=0.9))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_as_its_formula_says(nesterov):
    model = build("mobilefacenet").double()
    config = OptimConfig(
        name="sgd", lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01, decay_set="all"
    )
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p.detach().clone() for name, p in parameters.items()}
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
            gradient = parameter.grad + 0.01 * wanted[name]
            velocity[name] = 0.9 * velocity[name] + gradient
            ahead = gradient + 0.9 * velocity[name] if nesterov else velocity[name]
            wanted[name] = wanted[name] - 0.1 * ahead
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=0, atol=1e-12)


def test_nesterov_without_momentum_is_an_error():
    config = OptimConfig(name="sgd", momentum=0, nesterov=True)
    with pytest.raises(ConfigError, match=r"optim\.momentum"):
        build_optimizer(parameter_groups(build(), config), config, CPU)


OPTIM = {"name": "sgd", "lr": 0.05, "weight_decay": 0.01, "decay_set": "all", "clip_norm": 0.0}


def engine_steps(group, name, stage, checkpointing):
    """Three SGD steps of a face model under DeepSpeed; whole weights afterwards, on every rank."""
    ranks = Ranks(group, group.rank(), group.size(), group.rank(), CPU)
    whole = Config.model_validate(
        {
            "loss": {"name": "arcface"},
            "optim": OPTIM,
            "zero": {"stage": stage},
            "train": {"global_batch_size": 8, "precision": "fp32"},
        }
    )
    model = build(name, grad_checkpointing=checkpointing)
    optimizer = build_optimizer(parameter_groups(model, whole.optim), whole.optim, CPU)
    engine = Engine(model, optimizer, whole, ranks)
    for number in range(3):
        with statistics_kept(model):
            rows = engine.forward_model()(pixels(4, seed=number)).rows  # the same on every rank
        engine.backward((rows * direction(rows)).sum(), last=True)
        assert engine.step(OPTIM["lr"]).applied
    result = {}
    for key, parameter in model.named_parameters():
        with engine.gathered([parameter]):
            result[key] = parameter.detach().clone()
    return result


def direction(rows):
    return torch.linspace(-0.1, 0.1, rows.numel()).view_as(rows)


@pytest.mark.parametrize(
    ("stage", "name"),
    [(0, "mobilefacenet"), (1, "timm:test_vit"), (2, "mobilefacenet"), (3, "timm:test_vit")],
)
def test_sgd_and_recomputing_under_deepspeed_equal_plain_torch(stage, name):
    model = build(name)
    config = OptimConfig(**OPTIM)
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    for number in range(3):
        optimizer.zero_grad()
        with statistics_kept(model):
            rows = model(pixels(4, seed=number)).rows
        (rows * direction(rows)).sum().backward()
        optimizer.step()
    start = dict(build(name).named_parameters())
    for weights in run_ranks(2, engine_steps, name, stage, True):
        for key, parameter in model.named_parameters():
            moved = float((parameter - start[key]).detach().abs().max())
            torch.testing.assert_close(
                weights[key], parameter.detach(), rtol=0, atol=1e-5 + 1e-3 * moved, msg=key
            )
