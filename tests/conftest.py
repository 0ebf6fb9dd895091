"""Torch is imported once, in the fork server, so that a test of four ranks starts in 0.1 s."""

import multiprocessing
import os
import warnings
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "numpy", "trainer.train"])

# A busy machine is not a fault of the code.
hypothesis.settings.register_profile("nsphere", deadline=None)
hypothesis.settings.load_profile("nsphere")

SHARED_DATASETS = Path(__file__).resolve().parents[2] / "shared" / "datasets"


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield


@pytest.fixture
def real_dataset():
    """Path of a real data set by name; skips with the reason where the folder is absent."""

    def find(name: str) -> Path:
        folder = SHARED_DATASETS / name
        if not folder.is_dir():
            pytest.skip(f"real data set {name} is not at {folder}")
        return folder

    return find
