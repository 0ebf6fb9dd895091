"""What is trained: two towers of open_clip (`towers.py`), one face backbone (`faces.py`), or text
towers (`texts/`).

Towers: `architecture.py` finds a model, `build.py` builds it, `initialise.py` is big_vision's
start; a new one is a JSON file. Faces: `backbones/` holds them by name, `weights.py` reads
published files. `layers.py` says how deep a parameter sits, for all. Loss and optimizer live
elsewhere.
"""

from trainer.models.build import build_model
from trainer.models.faces import FaceEmbeddings, FaceModel, build_face_model
from trainer.models.texts import TextEmbeddings, TextModel
from trainer.models.texts.build import build_text_model
from trainer.models.towers import Embeddings, TwoTower

__all__ = [
    "Embeddings",
    "FaceEmbeddings",
    "FaceModel",
    "TextEmbeddings",
    "TextModel",
    "TwoTower",
    "build_face_model",
    "build_model",
    "build_text_model",
]
