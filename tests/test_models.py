import json
import math
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from trainer.config import ConfigError, ModelConfig
from trainer.models import build_model
from trainer.models.layers import parameter_layers

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
TINY = str(MODELS / "tiny_vit_32.json")
CONVNEXT = str(MODELS / "small_convnext_64.json")


def tiny(loss_name="clip", **fields):
    return build_model(ModelConfig(**({"name": TINY} | fields)), loss_name=loss_name)


def write_config(folder, name="model.json", **changes):
    """The tiny model's JSON with changes: `vision=` and `text=` go into the towers' parts."""
    cfg = json.loads(Path(TINY).read_text())
    cfg["vision_cfg"] |= changes.pop("vision", {})
    cfg["text_cfg"] |= changes.pop("text", {})
    path = Path(folder) / name
    path.write_text(json.dumps(cfg | changes))
    return str(path)


def batch(model, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (n, 3, *model.image_size), generator=generator, dtype=torch.uint8
    )
    texts = torch.randint(1, 40_000, (n, model.context_length), generator=generator)
    return images, texts


# --- names ---------------------------------------------------------------------------------------


@pytest.fixture
def nothing_drawn(monkeypatch):
    """On the meta device there is nothing to draw, and pretending to takes most of the time."""
    for name in ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(timm.layers.weight_init, "_trunc_normal_", lambda tensor, *_: tensor)


@pytest.mark.slow
def test_every_open_clip_name_builds_or_says_what_it_needs(monkeypatch, nothing_drawn):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in open_clip.list_models():
        text_cfg = open_clip.get_model_config(name)["text_cfg"]
        config = ModelConfig(name=name)
        if repo := text_cfg.get("hf_model_name"):
            with pytest.raises(ConfigError, match=repo):
                build_model(config, loss_name="clip", device="meta")
            continue
        model = build_model(config, loss_name="siglip", device="meta")
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert len(model.image_size) == 2 and model.context_length > 0
        layers = parameter_layers(model)
        for tower in ("image", "text"):
            depths = {layer.depth for layer in layers.values() if layer.tower == tower}
            assert depths == set(range(max(depths) + 1)), name  # no gap


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("ViT-B-23", "ViT-B-32"), ("vit-b-32", "ViT-B-32"), ("ViT-B-16-SigLP", "ViT-B-16-SigLIP")],
)
def test_a_wrong_name_gives_the_nearest(wrong, right):
    with pytest.raises(ConfigError) as error:
        tiny(name=wrong)
    assert wrong in str(error.value) and f"{right}" in str(error.value).split("nearest: ")[1]
    assert "\n" not in str(error.value)


def test_a_wrong_path_gives_the_nearest_file():
    with pytest.raises(ConfigError, match=r"tiny_vit_23\.json does not exist.*tiny_vit_32\.json"):
        tiny(name=str(MODELS / "tiny_vit_23.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "no JSON object"),
        ('{"embed_dim": 8}', "lacks vision_cfg, text_cfg"),
        (
            '{"embed_dim": 8, "vision_cfg": {"depth": 3}, "text_cfg": {}}',
            "cannot be built: .*'depth'",
        ),
        (
            '{"embed_dim": 8, "vision_cfg": {"timm_model_name": "vitt_tiny"}, "text_cfg": {}}',
            "cannot be built: .*vitt_tiny",
        ),
    ],
)
def test_a_broken_json_config_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        tiny(name=str(path))
    assert "\n" not in str(error.value)


def test_a_json_file_cannot_shadow_a_built_in_name(tmp_path):
    tiny(name=write_config(tmp_path, "ViT-B-32.json"))
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 512


# --- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TINY, CONVNEXT])
def test_embeddings_are_open_clips_from_uint8_pixels(name):
    model = tiny("siglip", name=name).eval()
    images, texts = batch(model)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (model.preprocess.mean, model.preprocess.std)
    )
    found = model(images, texts)
    wanted_images = model.clip.encode_image((images / 255 - mean) / std, normalize=True)
    wanted_texts = model.clip.encode_text(texts, normalize=True)
    torch.testing.assert_close(found.images, wanted_images, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.texts, wanted_texts, rtol=0, atol=1e-6)
    assert found.images.shape == (3, model.embed_dim)


def test_either_side_alone():
    model = tiny().eval()
    images, texts = batch(model)
    both = model(images, texts)
    assert model(images).texts is None and model(None, texts).images is None
    assert torch.equal(model(images).images, both.images)
    assert torch.equal(model(None, texts).texts, both.texts)


def test_rows_have_unit_length_in_float32_under_autocast():
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*batch(model))
    for rows in (found.images, found.texts):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert found.scale.dtype == torch.float32


def test_pixels_must_be_uint8():
    model = tiny()
    with pytest.raises(TypeError, match="uint8"):
        model(torch.rand(2, 3, 32, 32))


def test_images_need_not_be_square(tmp_path):
    name = write_config(tmp_path, vision={"image_size": [32, 64]})
    model = tiny(name=name)
    assert model.image_size == (32, 64)
    assert model(torch.zeros(2, 3, 32, 64, dtype=torch.uint8)).images.shape == (2, 64)


def test_preprocessing_is_the_published_one_or_the_files(tmp_path):
    def preprocess(name):
        config = ModelConfig(name=name)
        return build_model(config, loss_name="clip", device="meta").preprocess

    assert preprocess("ViT-B-32").mean == open_clip.OPENAI_DATASET_MEAN
    assert preprocess("ViT-B-32").resize_mode == "shortest"
    assert preprocess("ViT-B-16-SigLIP").std == (0.5, 0.5, 0.5)
    assert preprocess("ViT-B-16-SigLIP").resize_mode == "squash"
    name = write_config(
        tmp_path, preprocess_cfg={"mean": [0.1, 0.2, 0.3], "resize_mode": "longest"}
    )
    assert preprocess(name).mean == (0.1, 0.2, 0.3)
    assert preprocess(name).resize_mode == "longest"


def test_the_tokenizer_travels_as_plain_values(tmp_path):
    spec = tiny().tokenizer_spec
    assert (spec.name, spec.context_length) == ("", 24)
    config = ModelConfig(name="ViT-B-16-SigLIP")
    spec = build_model(config, loss_name="siglip", device="meta").tokenizer_spec
    assert (spec.name, spec.context_length) == ("timm/ViT-B-16-SigLIP", 64)
    assert dict(spec.options) == {"clean": "canonicalize"}


# --- scale and bias ------------------------------------------------------------------------------


@torch.no_grad()
def test_scale_and_bias_start_at_the_published_values_with_one_dimension():
    clip, siglip = tiny("clip"), tiny("siglip")
    assert clip.bias is None and "bias" not in clip.state_dict()
    assert clip.log_scale.shape == siglip.log_scale.shape == siglip.bias.shape == (1,)
    assert float(clip(None, batch(clip)[1]).scale) == pytest.approx(1 / 0.07, rel=1e-6)
    assert float(siglip.log_scale) == pytest.approx(math.log(10), rel=1e-6)
    assert float(siglip.bias) == -10.0
    own = tiny("siglip", init_scale=5.0, init_bias=-2.71)
    assert float(own.log_scale.exp()) == pytest.approx(5, rel=1e-6)
    assert float(own.bias) == pytest.approx(-2.71, rel=1e-6)


def test_the_scale_has_limits_unless_it_is_free():
    assert tiny(max_scale=50.0).log_scale_limits == (0.0, pytest.approx(math.log(50)))
    assert tiny(max_scale=math.inf).log_scale_limits == (-math.inf, math.inf)


# --- start weights -------------------------------------------------------------------------------


def test_start_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = build_model(ModelConfig(name=TINY), loss_name="clip", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    same = build_model(ModelConfig(name=TINY), loss_name="clip", seed=3)
    other = build_model(ModelConfig(name=TINY), loss_name="clip", seed=4)
    for name, parameter in one.state_dict().items():
        assert torch.equal(parameter, same.state_dict()[name])
    assert not torch.equal(one.clip.visual.proj, other.clip.visual.proj)


def close_to_std(parameter, std):
    assert float(parameter.detach().std()) == pytest.approx(std, rel=0.06)
    assert abs(float(parameter.detach().mean())) < 0.05 * std


def test_open_clips_initialisation():
    clip = tiny(name=str(MODELS / "small_vit_64.json")).clip
    text_width, vision_width, layers = 128, 192, 3
    close_to_std(clip.token_embedding.weight, 0.02)
    close_to_std(clip.positional_embedding, 0.01)
    close_to_std(clip.text_projection, text_width**-0.5)
    block = clip.transformer.resblocks[1]
    close_to_std(block.attn.in_proj_weight, text_width**-0.5)
    close_to_std(block.attn.out_proj.weight, text_width**-0.5 * (2 * layers) ** -0.5)
    close_to_std(block.mlp.c_fc.weight, (2 * text_width) ** -0.5)
    close_to_std(clip.visual.proj, vision_width**-0.5)
    close_to_std(clip.visual.positional_embedding, vision_width**-0.5)


def test_big_visions_initialisation(tmp_path):
    name = write_config(tmp_path, vision={"width": 128}, text={"width": 128})
    clip = tiny("siglip", name=name, init="big_vision").clip
    for block in (clip.visual.transformer.resblocks[0], clip.transformer.resblocks[1]):
        for kernel in (*block.attn.in_proj_weight.chunk(3), block.mlp.c_fc.weight):
            bound = math.sqrt(6 / sum(kernel.shape))  # Xavier's
            assert 0.97 * bound < float(kernel.detach().abs().max()) <= bound
            close_to_std(kernel, bound / math.sqrt(3))
        assert 0 < float(block.mlp.c_fc.bias.detach().abs().max()) < 1e-5
        assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
        assert torch.equal(block.ln_1.weight, torch.ones(128))
    close_to_std(clip.visual.positional_embedding, 128**-0.5)
    close_to_std(clip.token_embedding.weight, 128**-0.5)
    close_to_std(clip.visual.conv1.weight, (3 * 8 * 8) ** -0.5)
    close_to_std(clip.visual.proj, 128**-0.5)
    assert not clip.visual.class_embedding.any()


def test_big_visions_initialisation_of_a_timm_tower_is_finite_and_drawn(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
    cfg = json.loads(Path(TINY).read_text()) | {"vision_cfg": vision, "custom_text": True}
    path = tmp_path / "timm.json"
    path.write_text(json.dumps(cfg))
    trunk = tiny(name=str(path), init="big_vision").clip.visual.trunk
    close_to_std(trunk.pos_embed, 192**-0.5)
    assert not trunk.cls_token.any()
    close_to_std(trunk.blocks[0].attn.qkv.weight, math.sqrt(2 / (192 + 3 * 192)))


# --- weights from elsewhere ----------------------------------------------------------------------


@torch.no_grad()
def test_a_local_checkpoint_of_open_clip_loads(tmp_path):
    source = tiny("siglip", init_scale=33.0, init_bias=-7.0)
    weights = {n.removeprefix("clip."): p for n, p in source.clip.state_dict().items()}
    weights["logit_scale"] = source.log_scale.detach().reshape([])
    path = tmp_path / "clip.safetensors"
    save_file(weights, path)
    loaded = build_model(ModelConfig(name=TINY, pretrained=str(path)), loss_name="clip", seed=9)
    assert torch.equal(loaded.clip.visual.proj, source.clip.visual.proj)
    assert float(loaded.log_scale.exp()) == pytest.approx(33.0, rel=1e-6)
    without = ModelConfig(name=TINY, pretrained=str(path), init_bias=-4.0, init_scale=2.0)
    loaded = build_model(without, loss_name="siglip")
    assert float(loaded.bias) == -4.0  # the file has none
    assert float(loaded.log_scale.exp()) == pytest.approx(2.0, rel=1e-6)  # asked for
    weights["logit_bias"] = source.bias.detach().reshape([])
    save_file(weights, path)
    loaded = build_model(without, loss_name="siglip")
    assert float(loaded.bias) == -7.0
    assert tiny("clip", pretrained=str(path)).bias is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file({"logit_scale": torch.zeros([]), "visual.proj": torch.zeros(3, 3)}, path)
    with pytest.raises(ConfigError, match=r"clip\.safetensors does not fit") as error:
        tiny(pretrained=str(path))
    assert "\n" not in str(error.value)


def test_an_unknown_tag_gives_the_nearest():
    with pytest.raises(ConfigError, match=r"neither a file nor a tag.*laion400m_e32"):
        tiny(name="ViT-B-32", pretrained="laion400m_e33")


@pytest.mark.parametrize(
    ("fields", "repo"),
    [
        ({"name": TINY, "pretrained": "hf-hub:laion/nothing-here"}, "laion/nothing-here"),
        ({"name": "hf-hub:laion/nothing-here"}, "laion/nothing-here"),
        ({"name": "ViT-S-32-alt", "pretrained": "unused"}, "none"),
    ],
)
def test_without_a_network_the_error_says_how(monkeypatch, tmp_path, fields, repo):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=repo) as error:
        tiny(**fields)
    if repo != "none":
        assert "HF_HUB_OFFLINE" in str(error.value)
    assert "\n" not in str(error.value)


def test_quick_gelu_follows_the_published_weights():
    config = ModelConfig(name="ViT-B-32", pretrained="openai")
    model = build_model(config, loss_name="clip", device="meta")
    assert model.architecture.model_cfg["quick_gelu"] is True
    assert type(model.clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


# --- frozen towers -------------------------------------------------------------------------------


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("unlocked", [0, 1, 2, 3, 9])
def test_locked_towers_are_open_clips(tmp_path, custom_text, unlocked):
    name = write_config(tmp_path, custom_text=custom_text)
    wanted = tiny(name=name).clip
    wanted.lock_image_tower(unlocked_groups=unlocked)
    wanted.lock_text_tower(unlocked_layers=unlocked)
    found = tiny(
        name=name,
        lock_image=True,
        lock_image_unlocked_groups=unlocked,
        lock_text=True,
        lock_text_unlocked_layers=unlocked,
    )
    trainable = {n: p.requires_grad for n, p in found.clip.named_parameters()}
    assert trainable == {n: p.requires_grad for n, p in wanted.named_parameters()}
    assert found.log_scale.requires_grad


def test_a_locked_timm_tower_with_its_last_groups_open():
    fields = {"name": CONVNEXT, "lock_image": True}
    assert not any(p.requires_grad for p in tiny(**fields).clip.visual.parameters())
    model = tiny(**fields, lock_image_unlocked_groups=3)
    names = {n for n, p in model.clip.visual.named_parameters() if p.requires_grad}
    assert "head.proj.weight" in names and any(
        n.startswith("trunk.stages.3.blocks.1.") for n in names
    )
    assert not any(
        n.startswith(("trunk.stem", "trunk.stages.2", "trunk.stages.3.blocks.0")) for n in names
    )
    assert all(p.requires_grad for p in model.clip.text.parameters())


def test_the_batch_norms_of_a_locked_tower_stand_still(tmp_path):
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    name = write_config(tmp_path, vision=vision)
    for lock, moved in ((True, False), (False, True)):
        model = tiny(name=name, lock_image=lock).train()
        before = model.clip.visual.bn1.running_mean.clone()
        model(batch(model)[0])
        assert torch.equal(model.clip.visual.bn1.running_mean, before) is not moved
    opened = tiny(name=name, lock_image=True, lock_image_unlocked_groups=2)
    names = {n for n, p in opened.clip.visual.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in names} == {"attnpool", "layer4"}


# --- memory and speed ----------------------------------------------------------------------------


def gradients(model):
    images, texts = batch(model)
    found = model(images, texts)
    ((found.images - 0.3) * (found.texts + 0.1)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [TINY, CONVNEXT])
def test_recomputed_activations_give_the_same_gradients(name):
    plain, recomputed = tiny(name=name), tiny(name=name, grad_checkpointing=True)
    trunk = getattr(recomputed.clip.visual, "trunk", None)
    assert trunk is None or trunk.stages[0].grad_checkpointing
    wanted = gradients(plain)
    found = gradients(recomputed)
    assert found.keys() == wanted.keys()
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-5, atol=1e-7)


def test_a_tower_that_cannot_recompute_says_so(tmp_path):
    name = write_config(tmp_path, vision={"layers": [1, 1, 1, 1], "width": 8})
    with pytest.raises(ConfigError, match="ResNet"):
        tiny(name=name, grad_checkpointing=True)


def test_patch_dropout_drops_in_training_only():
    model = tiny(patch_dropout=0.5)
    seen = []
    model.clip.visual.transformer.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[1])
    )
    images = batch(model)[0]
    model.train()(images)
    model.eval()(images)
    assert seen == [1 + 8, 1 + 16]


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_patch_dropout_needs_patches(tmp_path, kind):
    name = write_config(tmp_path, vision={"layers": [1, 1, 1, 1], "width": 8})
    with pytest.raises(ConfigError):
        tiny(name=CONVNEXT if kind == "convnext" else name, patch_dropout=0.5)


def test_compiled_towers_are_the_same_function(monkeypatch):
    calls = []

    def compile_eagerly(function):
        calls.append(function.__name__)
        return torch._dynamo.optimize("eager")(function)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    plain, compiled = tiny().eval(), tiny(compile=True).eval()
    assert calls == ["encode_image", "encode_text"]
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    images, texts = batch(plain)
    for found, wanted in zip(compiled(images, texts)[:2], plain(images, texts)[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_coca_trains_as_a_two_tower_with_its_captioner_frozen():
    model = build_model(ModelConfig(name="coca_ViT-B-32"), loss_name="clip", device="meta")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("clip.text_decoder.")}


def test_rows_of_zero_images_still_have_unit_length():
    model = tiny()
    rows = model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).images
    torch.testing.assert_close(F.normalize(rows, dim=1), rows, rtol=0, atol=1e-6)


def test_positional_pooling_starts_with_a_position_a_head(tmp_path):
    cfg = {
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64},
        "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1},
    }
    path = tmp_path / "resnet.json"
    path.write_text(json.dumps(cfg))
    model = build_model(ModelConfig(name=str(path), init="positional"), loss_name="clip")
    pool = model.clip.visual.attnpool
    tokens = torch.rand(3, 4, 256) + pool.positional_embedding[1:]
    keys = pool.k_proj(tokens).view(3, 4, pool.num_heads, -1)
    query = pool.q_proj(tokens.mean(1)).view(3, 1, pool.num_heads, -1)
    weights = ((query * keys).sum(-1) / 16**0.5).softmax(1)  # (3, positions, heads)
    for head in range(pool.num_heads):
        assert (weights[:, :, head].argmax(1) == head % 4).all()
    assert weights.amax(1).mean() > 0.8
    with pytest.raises(ConfigError, match="no attention pooling"):
        build_model(ModelConfig(init="positional"), loss_name="clip")
