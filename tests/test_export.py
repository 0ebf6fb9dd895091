import json
import logging
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.config import ConfigError, ModelConfig
from trainer.export import export_open_clip, export_safetensors, load_towers
from trainer.models import build_model

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
TINY = str(MODELS / "tiny_vit_32.json")
CONVNEXT = str(MODELS / "small_convnext_64.json")

# A SigLIP in small: timm's tower with attention pooling, a text tower that pools its last token.
SIGLIP = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 2000,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
}
RESNET = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 2000, "width": 32, "heads": 2, "layers": 1},
}


def model_name(folder, kind):
    if not isinstance(kind, dict):
        return kind
    path = folder / "model.json"
    path.write_text(json.dumps(kind))
    return str(path)


def trained(config, loss_name):
    """A model whose weights, statistics, scale and bias all differ from the start's."""
    model = build_model(config, loss_name=loss_name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "loss_name"),
    [(TINY, "clip"), (CONVNEXT, "siglip"), (SIGLIP, "siglip"), (SIGLIP, "clip"), (RESNET, "clip")],
    ids=["vit", "timm", "siglip", "siglip-with-clip-loss", "resnet"],
)
def test_open_clip_loads_the_folder_with_equal_embeddings(tmp_path, kind, loss_name):
    config = ModelConfig(name=model_name(tmp_path, kind))
    model = trained(config, loss_name)
    out = export_open_clip(model.state_dict(), config, tmp_path / "out", loss_name=loss_name)

    rng = np.random.default_rng(0)
    height, width = model.image_size
    pictures = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(3)
    ]
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    texts = torch.from_numpy(rng.integers(1, 2000, (3, model.context_length)))
    with torch.no_grad():
        wanted = model(pixels, texts)

    name = f"local-dir:{out}"
    loaded, _, preprocess = open_clip.create_model_and_transforms(name)
    again, preprocess_again = open_clip.create_model_from_pretrained(name)
    for other, transform in ((loaded, preprocess), (again, preprocess_again)):
        other.eval()
        with torch.no_grad():
            images = other.encode_image(
                torch.stack([transform(p) for p in pictures]), normalize=True
            )
            rows = other.encode_text(texts, normalize=True)
        torch.testing.assert_close(images, wanted.images, rtol=0, atol=1e-5)
        torch.testing.assert_close(rows, wanted.texts, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.logit_scale.exp().reshape(1), wanted.scale)
        assert (other.logit_bias is None) == (loss_name == "clip")
        if wanted.bias is not None:
            torch.testing.assert_close(other.logit_bias.reshape(1), wanted.bias)


def test_the_exported_folder_is_a_model_for_us_too(tmp_path):
    config = ModelConfig(name=TINY)
    model = trained(config, "siglip")
    out = export_open_clip(model.state_dict(), config, tmp_path / "out", loss_name="siglip")
    for name, pretrained in ((f"local-dir:{out}", ""), (str(out), str(out)), (TINY, str(out))):
        fields = ModelConfig(name=name, pretrained=pretrained)
        again = build_model(fields, loss_name="siglip", seed=5).eval()
        for key, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key


def test_the_exported_tokenizer_is_the_models(tmp_path):
    config = ModelConfig(name=TINY)
    weights = build_model(config, loss_name="clip").state_dict()
    out = export_open_clip(weights, config, tmp_path / "out", loss_name="clip")
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(["a red circle"])
    assert tokens.shape == (1, 24)
    assert torch.equal(
        tokens, open_clip.get_tokenizer("ViT-B-32", context_length=24)(["a red circle"])
    )


def test_a_tokenizer_that_is_not_here_is_said_and_the_rest_exported(tmp_path, caplog):
    kind = SIGLIP | {"text_cfg": SIGLIP["text_cfg"] | {"hf_tokenizer_name": str(tmp_path / "gone")}}
    config = ModelConfig(name=model_name(tmp_path, kind))
    weights = build_model(config, loss_name="siglip").state_dict()
    with caplog.at_level(logging.WARNING, "nsphere.export"):
        out = export_open_clip(weights, config, tmp_path / "out", loss_name="siglip")
    assert "gone" in caplog.text
    open_clip.create_model_from_pretrained(f"local-dir:{out}")


def test_load_towers_gives_back_the_model_in_evaluation_mode():
    config = ModelConfig(name=TINY, patch_dropout=0.5)
    model = trained(config, "clip")
    again = load_towers(model.state_dict(), config, loss_name="clip")
    assert not again.training
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model(pixels).images, again(pixels).images)


def test_safetensors_hold_open_clips_names(tmp_path):
    config = ModelConfig(name=TINY)
    model = trained(config, "siglip")
    path = export_safetensors(model.state_dict(), tmp_path / "sub" / "model.safetensors")
    weights = load_file(path)
    reference = open_clip.create_model("ViT-B-32", load_weights=False).state_dict().keys()
    block = "transformer.resblocks.1."
    assert {n for n in weights if block not in n} - {"logit_bias"} == {
        n for n in reference if "resblocks." not in n or "resblocks.0." in n
    }
    assert weights["logit_scale"].shape == weights["logit_bias"].shape == ()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "other loss"])
def test_weights_of_another_model_are_refused_and_leave_nothing(tmp_path, damage):
    config = ModelConfig(name=TINY)
    weights = dict(build_model(config, loss_name="clip").state_dict())
    if damage == "missing":
        del weights["clip.visual.proj"]
    if damage == "unknown":
        weights["clip.visual.extra"] = torch.zeros(1)
    if damage == "shape":
        weights["clip.visual.proj"] = torch.zeros(2, 2)
    loss_name = "siglip" if damage == "other loss" else "clip"
    with pytest.raises(ConfigError, match="not those of"):
        export_open_clip(weights, config, tmp_path / "out", loss_name=loss_name)
    assert not list(tmp_path.iterdir())


def test_an_existing_export_is_never_overwritten(tmp_path):
    config = ModelConfig(name=TINY)
    weights = build_model(config, loss_name="clip").state_dict()
    out = tmp_path / "out"
    out.mkdir()
    export_open_clip(weights, config, out, loss_name="clip")  # an empty folder is fine
    with pytest.raises(ConfigError, match="not empty"):
        export_open_clip(weights, config, out, loss_name="clip")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
