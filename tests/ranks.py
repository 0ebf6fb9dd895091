"""`run_ranks(world_size, function, *args)`: real gloo processes as plain pytest.

The fork server holds torch already (tests/conftest.py), so a start costs about 0.1 s a rank, and a
FileStore needs no port. Every rank's traceback is reported, the earliest first: without that a
peer's "connection closed" hides the guilty rank.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def _rank_main(
    folder: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        TORCH_FR_BUFFER_SIZE="64",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
        )
        result = function(dist.group.WORLD, *args)
        Path(f"{folder}/result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - told to the parent, then the rank dies
        Path(f"{folder}/error-{rank}").write_text(f"{time.time()}\n{traceback.format_exc()}")
        os._exit(1)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 200
) -> list:
    """Call `function(group, *args)` on `world_size` gloo ranks; return each rank's result in order.

    `function` and `args` must pickle: a module-level function, tensors, plain values.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(folder, rank, world_size, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(p.is_alive() for p in ranks) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in ranks):
                time.sleep(1.0)
                break
            time.sleep(0.01)
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        errors = sorted(
            ((p.name, p.read_text()) for p in Path(folder).glob("error-*")),
            key=lambda item: float(item[1].split("\n", 1)[0]),
        )
        if errors:
            raise AssertionError(
                "\n".join(f"--- {name}\n{text.split(chr(10), 1)[1]}" for name, text in errors)
            )
        codes = [p.exitcode for p in ranks]
        if any(codes):
            raise AssertionError(f"exit codes of the ranks: {codes} (timeout {timeout_s} s?)")
        return [pickle.loads(Path(f"{folder}/result-{r}").read_bytes()) for r in range(world_size)]
