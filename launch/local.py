"""N ranks on this machine, through torch.distributed's elastic agent, in this process."""

import logging
import os
import sys
import uuid
from pathlib import Path

from launch.signals import STOPPED

SHUTDOWN_TIMEOUT_S = 600  # a stopped run saves first; torch's default of 30 s would cut it off
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torchrun's default would orphan ranks on USR1


def run_local(num_ranks: int, arguments: list[str], stopped_marker: Path | None = None) -> int:
    """Run `nsphere ARGUMENTS` on `num_ranks` ranks; the exit code of the job.

    The first rank that fails ends the others and gives the code. The agent does not tell the code
    of ranks that it stopped itself, so a run that saved and stopped leaves `stopped_marker`.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["PYTHONSAFEPATH"] = "1"  # a ./data of the user's must not stand in for ours
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_TIMEOUT_S)
    # With the agent's shared store a restarted gloo group meets its dead peers' addresses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    # What it says of signals and exits is ours to say, in a line each.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        signals_to_handle=SIGNALS,
    )
    command = ["-P", "-m", "launch.cli", *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        stopped = stopped_marker is not None and stopped_marker.exists()
        return STOPPED if stopped else 128 + int(error.sigval)
    return 0
