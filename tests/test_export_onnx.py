"""ONNX files against torch through onnxruntime, and not only by the exporter's own check."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_faces import face_config
from tiny_runs import train_rank

from trainer.checkpoint import find_checkpoint, load_weights
from trainer.config import ConfigError, ModelConfig
from trainer.export import (
    OnnxOptions,
    export_face_safetensors,
    export_onnx,
    load_faces,
)
from trainer.export.formats import export_checkpoint
from trainer.models import build_face_model, build_model

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

TINY = str(Path(__file__).resolve().parents[1] / "configs" / "models" / "tiny_vit_32.json")
SIZE = 32


def config(name, **fields):
    return ModelConfig(**{"name": name, "image_size": SIZE, "embedding_dim": 24, **fields})


def trained(name="mobilefacenet", **fields):
    """A model whose weights and statistics differ from the start's, with sizeable embeddings."""
    model = build_face_model(config(name, **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.rand(tensor.shape, generator=generator)
        for _ in range(3):
            model(pixels(8))
    return model.eval()


def pixels(n, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"images": images})
    return torch.from_numpy(rows)


@pytest.mark.parametrize(
    "name", ["iresnet18", "mobilefacenet", "timm:test_vit", "timm:test_convnext"]
)
@pytest.mark.parametrize("flip", [False, True])
def test_any_batch_of_pixels_gives_torchs_rows(tmp_path, name, flip):
    model = trained(name)
    out = tmp_path / "sub" / "face.onnx"
    parity = export_onnx(model, out, OnnxOptions(flip=flip))
    assert parity.max_difference <= 1e-4 * parity.max_value
    assert parity.min_cosine > 0.99999
    assert list(out.parent.iterdir()) == [out]
    for n in (1, 3, 7):
        images = pixels(n, seed=n)
        with torch.no_grad():
            wanted = model(images).rows
            if flip:
                wanted = wanted + model(images.flip(3)).rows
        found = run(out, images.numpy())
        assert found.shape == (n, 24)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        ({"uint8": True}, lambda x: x),
        ({"uint8": False}, lambda x: x.astype(np.float32)),
        ({"uint8": False, "normalise": False}, lambda x: (x.astype(np.float32) / 255 - 0.5) / 0.5),
    ],
)
def test_each_input_form_is_the_same_function(tmp_path, options, prepare):
    model = trained()
    export_onnx(model, tmp_path / "face.onnx", OnnxOptions(**options))
    images = pixels(3)
    with torch.no_grad():
        wanted = model(images).rows
    found = run(tmp_path / "face.onnx", prepare(images.numpy()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_the_file_says_what_goes_in_and_shows_the_normalisation_first(tmp_path):
    export_onnx(trained(), tmp_path / "face.onnx", OnnxOptions(flip=True))
    proto = onnx.load(str(tmp_path / "face.onnx"))
    (images,), (rows,) = proto.graph.input, proto.graph.output
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == [
        "batch",
        3,
        SIZE,
        SIZE,
    ]
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in rows.type.tensor_type.shape.dim] == ["batch", 24]
    # insightface's onnx_helper looks for them among the first eight nodes
    assert {"Sub", "Mul"} <= {node.op_type for node in proto.graph.node[:8]}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert "uint8" in metadata["input"]
    assert "mirror" in metadata["output"]


def test_the_exporters_own_check_finds_a_wrong_file(tmp_path, monkeypatch):
    from trainer.export import onnx_file

    def spoil(path, embed_dim, metadata):
        finish(path, embed_dim, metadata)
        proto = onnx.load(str(path))
        weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = onnx.numpy_helper.to_array(weight).copy()
        values.flat[::3] *= 1.5
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(proto, str(path))

    finish = onnx_file._finish
    monkeypatch.setattr(onnx_file, "_finish", spoil)
    with pytest.raises(ConfigError, match="disagrees: max difference"):
        export_onnx(trained(), tmp_path / "face.onnx", OnnxOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss_name", ["clip", "siglip"])
def test_the_image_tower_of_clip(tmp_path, loss_name):
    model = build_model(ModelConfig(name=TINY), loss_name=loss_name).eval()
    export_onnx(model, tmp_path / "tower.onnx", OnnxOptions())
    images = pixels(5)
    with torch.no_grad():
        wanted = model(images).images
    found = run(tmp_path / "tower.onnx", images.numpy())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    with pytest.raises(ConfigError, match="--flip is for face models"):
        export_onnx(model, tmp_path / "flip.onnx", OnnxOptions(flip=True))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra_one_error_says_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'nsphere\[onnx\]'"):
        export_onnx(trained(), tmp_path / "face.onnx", OnnxOptions())
    assert not list(tmp_path.iterdir())


def test_bytes_cannot_be_normalised_already():
    with pytest.raises(ConfigError, match="--input float"):
        OnnxOptions(uint8=True, normalise=False)


def test_what_torch_cannot_export_is_one_error_and_no_file(tmp_path):
    model = trained()
    model.backbone.conv_sep.layers.append(torch.nn.Identity())
    model.backbone.conv_sep.layers[-1].forward = lambda x: torch.fft.rfft(x).real
    with pytest.raises(ConfigError, match="cannot export") as error:
        export_onnx(model, tmp_path / "face.onnx", OnnxOptions())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# --- safetensors and loading ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iresnet18", "timm:test_resnet"])
def test_safetensors_hold_the_published_names_and_load_again(tmp_path, name):
    model = trained(name)
    path = export_face_safetensors(
        model.state_dict(), config(name), tmp_path / "a" / "f.safetensors"
    )
    weights = load_file(path)
    assert list(path.parent.iterdir()) == [path]
    if name == "iresnet18":
        assert weights.keys() == model.backbone.state_dict().keys()
        assert {"layer1.0.bn1.weight", "features.running_mean", "fc.bias"} <= weights.keys()
    else:
        import timm

        plain = timm.create_model("test_resnet", num_classes=24)
        trunk = {key: t for key, t in weights.items() if not key.startswith("neck.")}
        plain.load_state_dict(trunk)
    again = build_face_model(config(name, pretrained=str(path)), seed=5).eval()
    with torch.no_grad():
        assert torch.equal(again(pixels(2)).rows, model(pixels(2)).rows)


def test_load_faces_gives_back_the_model_and_refuses_another(tmp_path):
    model = trained("timm:test_vit")
    again = load_faces(model.state_dict(), config("timm:test_vit", dropout=0.5))
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(pixels(2)).rows, model(pixels(2)).rows)
    weights = dict(model.state_dict())
    del weights["backbone.trunk.pos_embed"]
    for refuse in (
        lambda: load_faces(weights, config("timm:test_vit")),
        lambda: export_face_safetensors(weights, config("timm:test_vit"), tmp_path / "x"),
    ):
        with pytest.raises(ConfigError, match=r"not those of timm:test_vit.*trunk\.pos_embed"):
            refuse()
    assert not list(tmp_path.iterdir())


def test_a_runs_checkpoint_becomes_each_format_of_its_kind(tmp_path):
    whole = face_config(
        tmp_path, train={"duration": "2 steps", "ema": 0.5}, model={"grad_checkpointing": True}
    )
    run_ranks(1, train_rank, whole, str(tmp_path / "run"))
    source = tmp_path / "run"
    checkpoint = find_checkpoint(source)
    for ema in (True, False):
        model = load_faces(load_weights(checkpoint, ema=ema), whole.model)
        onnx_out, plain_out = tmp_path / f"{ema}.onnx", tmp_path / f"{ema}.safetensors"
        line = export_checkpoint(source, onnx_out, "onnx", OnnxOptions(), ema=ema)
        assert str(checkpoint) in line
        assert "max difference to torch" in line
        with torch.no_grad():
            wanted = model(pixels(3)).rows
        found = run(onnx_out, pixels(3).numpy())
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        export_checkpoint(checkpoint, plain_out, "", OnnxOptions(), ema=ema)
        bias = load_file(plain_out)["neck.bias"]
        assert torch.equal(bias, model.backbone.neck.bias)
    with pytest.raises(ConfigError, match="'arcface' becomes safetensors, onnx"):
        export_checkpoint(source, tmp_path / "x", "open_clip", OnnxOptions(), ema=True)
