"""ONNX of a face backbone or an image tower, checked against torch through onnxruntime.

The batch dimension is free. Normalisation and the sum with the mirror image can be part of the
graph, so that whoever runs it cannot get them wrong. onnx and onnxruntime are the extra `onnx`.

torch's exporter by tracing is used (`dynamo=False`): the newer one wants a further package, and
whatever either may get wrong, the comparison finds.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ConfigError
from trainer.models.faces import MEAN, STD, FaceModel
from trainer.models.towers import TwoTower

OPSET = 17  # the first with LayerNormalization
INPUT, OUTPUT = "images", "embeddings"
CHECKED_BATCHES = (1, 2, 5)  # traced with two: a batch size that got fixed would show
TOLERANCE = 1e-3  # of the largest number in the embeddings


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """What the graph does beside the network."""

    uint8: bool = True
    """Take pixels as bytes; else the same numbers as float32."""
    normalise: bool = True
    """(x - mean) / std inside; else the input is float32 and already normalised."""
    flip: bool = False
    """Return the embedding of the image plus that of its mirror image (faces only)."""

    def __post_init__(self) -> None:
        if self.uint8 and not self.normalise:
            raise ConfigError(
                "pixels as bytes are not normalised: take --input float with --no-normalise"
            )


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime's embeddings are from torch's, on random images."""

    max_difference: float
    max_value: float  # the largest number in torch's embeddings, for scale
    min_cosine: float

    def __str__(self) -> str:
        return (
            f"max difference to torch {self.max_difference:.2e} (values up to"
            f" {self.max_value:.2f}), least cosine {self.min_cosine:.7f}"
        )


def export_onnx(model: FaceModel | TwoTower, out: Path, options: OnnxOptions) -> Parity:
    """Write one ONNX file: (batch, 3, H, W) RGB pixels -> (batch, d).

    Rows of a face model keep their length; those of an image tower are unit rows. Raises
    ConfigError without the extra `onnx`, for what torch cannot export, and where onnxruntime gives
    other numbers than torch; then no file is left.
    """
    _check_installed()
    graph = _ImageGraph(model, options).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        _trace(graph, model.image_size, part)
        _finish(part, graph.embed_dim, _metadata(graph, options))
        parity = _compare(graph, model.image_size, part)
        if not parity.max_difference <= TOLERANCE * parity.max_value:
            raise ConfigError(f"{out} is not written: onnxruntime disagrees: {parity}")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return parity


class _ImageGraph(nn.Module):
    """What is traced."""

    def __init__(self, model: FaceModel | TwoTower, options: OnnxOptions) -> None:
        super().__init__()
        self.model, self.options = model, options
        self.mean, self.std = MEAN, STD
        if isinstance(model, TwoTower):
            if options.flip:
                raise ConfigError("--flip is for face models: a mirrored picture reads otherwise")
            self.mean, self.std = model.preprocess.mean, model.preprocess.std
        self.embed_dim = model.embed_dim
        self.embed: Callable[[Tensor], Tensor] = _embed_with(model)

    def forward(self, images: Tensor) -> Tensor:
        if self.options.normalise:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            images = images.float() if self.options.uint8 else images
            images = (images - 255 * mean.view(1, 3, 1, 1)) * (1 / (255 * std)).view(1, 3, 1, 1)
        if not self.options.flip:
            return self.embed(images)
        rows = self.embed(torch.cat([images, images.flip(3)]))
        return rows.reshape(2, -1, self.embed_dim).sum(0)

    def draw(self, batch: int, image_size: tuple[int, int]) -> Tensor:
        """Random images as the graph takes them."""
        generator = torch.Generator().manual_seed(batch)
        size = (batch, 3, *image_size)
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        if self.options.uint8:
            return pixels
        return pixels.float() if self.options.normalise else (pixels.float() - 127.5) / 127.5


def _embed_with(model: FaceModel | TwoTower) -> Callable[[Tensor], Tensor]:
    if isinstance(model, FaceModel):
        return model.embed_pixels
    return lambda pixels: F.normalize(model.clip.encode_image(pixels, normalize=False), dim=-1)


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX needs a package that is not here ({error}): `pip install 'nsphere[onnx]'`"
        ) from None


def _trace(graph: _ImageGraph, image_size: tuple[int, int], path: Path) -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator has no ONNX form
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, of shapes that the comparison covers
            torch.onnx.export(
                graph,
                (graph.draw(2, image_size),),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"torch cannot export this network to ONNX: {line}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _metadata(graph: _ImageGraph, options: OnnxOptions) -> dict[str, str]:
    kind = "uint8 pixels" if options.uint8 else "float32 pixels of 0 to 255"
    if not options.normalise:
        kind = f"float32 (pixel / 255 - mean) / std, mean {graph.mean}, std {graph.std}"
    rows = "embedding of the image plus its mirror's" if options.flip else "embedding"
    return {"input": f"RGB, {kind}", "output": rows}


def _finish(path: Path, embed_dim: int, metadata: dict[str, str]) -> None:
    """Declare the output's width, drop the exporter's aliases of constants, say what goes in.

    The aliases would stand first in the graph, where readers look for the normalisation.
    """
    import onnx

    proto: Any = onnx.load(str(path))
    constants = {tensor.name for tensor in proto.graph.initializer}
    aliases = {
        node.output[0]: node.input[0]
        for node in proto.graph.node
        if node.op_type == "Identity" and node.input[0] in constants
    }
    nodes = [node for node in proto.graph.node if node.output[0] not in aliases]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = aliases.get(name, name)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = embed_dim
    for name, text in metadata.items():
        proto.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _compare(graph: _ImageGraph, image_size: tuple[int, int], path: Path) -> Parity:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found, wanted = [], []
    for batch in CHECKED_BATCHES:
        images = graph.draw(batch, image_size)
        with torch.no_grad():
            wanted.append(graph(images).double())
        (rows,) = session.run(None, {INPUT: images.numpy()})
        found.append(torch.from_numpy(rows).double())
    ours, theirs = torch.cat(found), torch.cat(wanted)
    return Parity(
        max_difference=float((ours - theirs).abs().max()),
        max_value=float(theirs.abs().max()),
        min_cosine=float(F.cosine_similarity(ours, theirs).min()),
    )
