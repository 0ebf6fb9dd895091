"""Weights for people without this repository: folders and files that other programs load.

`towers.py` writes an open_clip folder or file, `faces.py` a backbone under its published names,
`texts.py` text towers and the rows of their labels, `onnx_file.py` an image side as ONNX;
`formats.py` chooses among them for a checkpoint. Their input is a plain state dict
(`trainer.checkpoint.load_weights`). Checkpoints that training resumes from are
`trainer/checkpoint.py`.
"""

from trainer.export.faces import export_face_safetensors, load_faces
from trainer.export.onnx_file import OnnxOptions, Parity, export_onnx
from trainer.export.towers import export_open_clip, export_safetensors, load_towers

__all__ = [
    "OnnxOptions",
    "Parity",
    "export_face_safetensors",
    "export_onnx",
    "export_open_clip",
    "export_safetensors",
    "load_faces",
    "load_towers",
]
