"""Turns batches into a trained model. Read `train.py` first: all else is one call away from it."""

from pathlib import Path

import data

# A user's own ./data folder must never stand in for our package: it would fail later and obscurely.
if data.__file__ is None or Path(data.__file__).parents[1] != Path(__file__).parents[1]:
    raise ImportError(
        f"'data' is {list(data.__path__)}, not nsphere's: start with the `nsphere` command, "
        "or set PYTHONSAFEPATH=1 so that the working directory is not searched for modules"
    )
