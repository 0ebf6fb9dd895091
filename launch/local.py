"""N ranks on this machine, or on each of several, through torch.distributed's elastic agent.

The agent runs in this process (`launch/agent.py`): it starts the ranks, meets the agents of the
other hosts, and starts all ranks again when one is lost.
"""

import logging
import os

from launch.hosts import Hosts
from launch.restarts import Restarts, verdict
from launch.signals import OWN_ERROR, RANK_LOST, STOPPED, StopRequest, say

_HOW_CODE = {"done": 0, "stopped": STOPPED, "failed": OWN_ERROR}


def run_local(
    num_ranks: int,
    arguments: list[str],
    *,
    hosts: Hosts | None = None,  # None: this machine alone
    restarts: Restarts | None = None,  # None: never
    stop: StopRequest | None = None,
) -> int:
    """Run `nsphere ARGUMENTS` on `num_ranks` ranks of this machine; the exit code of the job.

    Ranks that are lost are started again, all together, as `restarts` allows. Raises LaunchError
    where several hosts cannot meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    from launch.agent import Agent, guard

    hosts = hosts or Hosts.alone()
    _prepare(num_ranks, hosts)
    agent = Agent(num_ranks, ["-P", "-m", "launch.cli", *arguments], hosts, restarts, stop)
    with guard(agent, hosts, stop):
        try:
            if agent.run() is None:  # it was one host more than the run takes
                return _HOW_CODE.get(restarts.ended() if restarts else "", RANK_LOST)
            agent.close_rendezvous()
        except SignalException as error:
            if agent.codes:
                return verdict(agent.codes.values())
            say(f"nsphere: {error.sigval.name}: stopped between two attempts")
            return STOPPED
        except RendezvousError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            how = restarts.ended() if restarts is not None else ""
            say(
                f"nsphere: the hosts of this run do not meet any more at {hosts.endpoint} "
                f"({reason}); the launcher there must live as long as the run"
            )
            return _HOW_CODE.get(how, RANK_LOST)
    return verdict(agent.codes.values())


def _prepare(num_ranks: int, hosts: Hosts) -> None:
    """The environment that the agent and its ranks read."""
    os.environ["PYTHONSAFEPATH"] = "1"  # a ./data of the user's must not stand in for ours
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    for name in logging.root.manager.loggerDict:  # each of its modules sets its own level
        if name.startswith("torch.distributed.elastic"):
            # What it says of signals and exits is ours to say, in a line each.
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if hosts.is_alone:
        return
    # When another host becomes the first, the others keep the address of its predecessor's shared
    # store (torch 2.15, dynamic_rendezvous.py:1225): rank 0 of each attempt opens one of its own.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if name := hosts.interface():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
