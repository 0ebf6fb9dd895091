"""What a run minimises: `build_objective` turns `[loss]` into one object that the loop drives.

`pairs.py` is for images with texts, `centers.py` for one backbone against class centers,
`labels.py` for texts against their labels. All know which tensors of a batch their model takes, the
loss of its outputs, what else moves in a step, what numbers people want to see, and what a
checkpoint must hold beside the engine's part.
"""

from trainer.objectives.build import build_model, build_objective
from trainer.objectives.objective import Model, Objective, Outputs

__all__ = ["Model", "Objective", "Outputs", "build_model", "build_objective"]
