"""How hard the negatives of a step are, for every run, and what a run may do about it.

`sample.py` picks a few rows of the global batch and brings them to every rank, `statistics.py`
holds them against each rank's own columns and merges O(1) numbers a row, `monitor.py` knows what a
row and a column are to each kind of objective. `controller.py` turns the numbers into the cluster
size of the next plan.
"""

from trainer.hardness.controller import Control, Decision, decide
from trainer.hardness.monitor import ClustersOf, Hardness, Keyed, build_hardness

__all__ = ["ClustersOf", "Control", "Decision", "Hardness", "Keyed", "build_hardness", "decide"]
