"""torch's elastic agent with our rules: who is started again, how long it waits, what it says.

Only this file knows the agent's inner names (torch 2.15, torch.distributed.elastic.agent.server).
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch.hosts import Hosts
from launch.meeting import ANSWER_S, within
from launch.ranks import LaunchError
from launch.restarts import Restarts, verdict
from launch.signals import RANK_LOST, STOP_SIGNALS, STOPPED, StopRequest, leave

LAST_CALL_S = 15  # that a run on MIN to MAX hosts waits for more than MIN
KEEP_ALIVE_S = 3  # between an agent's signs of life; three may be missed
SHUTDOWN_TIMEOUT_S = 600  # a stopped run saves first; torch's default of 30 s would cut it off
LEAVING_S = 15.0  # that the ranks have, once one has failed, to write their stacks and leave
AT_ONCE_S = 3.0  # for a second signal
STUCK_S = 10.0  # that the agent has to react when all its ranks are gone and it was asked to stop


class Agent(LocalElasticAgent):
    """The ranks of this host."""

    def __init__(
        self,
        num_ranks: int,
        command: list[str],
        hosts: Hosts,
        restarts: Restarts | None,
        stop: StopRequest | None,
    ) -> None:
        """Raises LaunchError where the hosts cannot meet."""
        self._rendezvous_handler = _open_rendezvous(hosts)
        spec = WorkerSpec(
            role="nsphere",
            local_world_size=num_ranks,
            entrypoint=sys.executable,
            args=tuple(command),
            rdzv_handler=self._rendezvous_handler,
            max_restarts=0,
            monitor_interval=0.1,
            local_addr=hosts.own_address,
        )
        super().__init__(spec, _OwnStreams(), shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        self._restarts, self._stop, self._alone = restarts, stop, hosts.is_alone
        self.codes: dict[int, int] = {}
        """Exit codes of this host's ranks in the last attempt, -number for a signal."""
        self.looked_at = time.monotonic()
        """When the agent last looked at its ranks: it may hang in a store that is cut off."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.looked_at = time.monotonic()
        if any(self._exit_codes().values()):
            self._let_others_leave()
            self.codes = self._exit_codes()
            self._kill_the_rest()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            self._remaining_restarts = int(self._may_restart())
        elif result.return_values:
            self.codes = dict.fromkeys(result.return_values, 0)
        return result

    def _may_restart(self) -> bool:
        if self._restarts is None:
            return False
        first = self._worker_group.group_rank == 0
        saved = verdict(self.codes.values()) == STOPPED
        if saved and not self._alone and self._rendezvous_handler.num_nodes_waiting() > 0:
            # The agent of a host that takes a new one in has stopped its ranks, and so all.
            self._restarts.note("a host joins the run", record=first)
            return True
        return self._restarts.allow(self.codes, record=first)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if worker_group.state == WorkerState.HEALTHY and self._restarts is not None:
            first = worker_group.group_rank == 0
            self._restarts.note("another host starts its ranks again, or joins", record=first)
        super()._restart_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002 - torch's
        # Before ranks are started again, because they failed or because a host joins: these save.
        self._shutdown(timeout=SHUTDOWN_TIMEOUT_S)

    def _shutdown(
        self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = SHUTDOWN_TIMEOUT_S
    ) -> None:
        asked = death_sig if death_sig in STOP_SIGNALS else signal.SIGTERM
        super()._shutdown(asked, timeout)
        self.codes = {**self._exit_codes(), **self.codes}

    def _exit_codes(self) -> dict[int, int]:
        """Rank -> code of this host's ranks that have ended."""
        workers = self._worker_group.workers
        codes = {
            workers[local].global_rank: process.poll()
            for local, process in self._processes().items()
        }
        return {rank: code for rank, code in codes.items() if code is not None}

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.codes, self._pcontext = {}, None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._stop is None:
            return super()._start_workers(worker_group)
        # A request that reaches a rank while Python starts waits until the rank can take it
        # (`StopRequest.install`): it would kill the rank, and the job end as one that failed.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pids = super()._start_workers(worker_group)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._stop.hand_over()  # the agent has put its handlers in place
        return pids

    def _let_others_leave(self) -> None:
        until = time.monotonic() + LEAVING_S
        while time.monotonic() < until:
            self._exit_codes()  # reaps
            if all(_state(pid) in "ZXTt" for pid in self._pids()):
                return
            time.sleep(0.05)

    def _kill_the_rest(self) -> None:
        """A stopped process, or one that hangs in the kernel, heeds nothing else."""
        for process in self._processes().values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def has_ranks(self) -> bool:
        """Whether a rank of this host runs; asked from another thread, so nobody is reaped."""
        return any(_state(pid) not in "ZX" for pid in self._pids())

    def _pids(self) -> list[int]:
        return [process.pid for process in self._processes().values()]

    def _processes(self) -> dict[int, Popen[bytes]]:
        """By local rank."""
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        handlers = self._pcontext.subprocess_handlers
        return {local: handler.proc for local, handler in handlers.items()}

    def close_rendezvous(self) -> None:
        """The run has ended: hosts that still wait for this one need not."""
        self._rendezvous_handler.shutdown()


class _OwnStreams(LogsSpecs):
    """Ranks write to this process's stdout and stderr, and leave no folders in /tmp."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Nothing is redirected."""
        here = dict.fromkeys(envs, "")
        return LogsDest(stdouts=here, stderrs=here, error_files=here)

    @property
    def root_log_dir(self) -> str:
        """There is none."""
        return ""


def _open_rendezvous(hosts: Hosts) -> RendezvousHandler:
    """The place where the agents meet; the host whose address it is keeps the store."""
    for keeps_store in [True, False] if hosts.is_here else [False]:
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint=hosts.endpoint,
            run_id=hosts.run_id,
            min_nodes=hosts.minimum,
            max_nodes=hosts.maximum,
            local_addr=hosts.own_address,
            is_host=str(keeps_store).lower(),
            join_timeout=int(hosts.wait_s),
            read_timeout=int(hosts.wait_s),
            last_call_timeout=LAST_CALL_S,
            keep_alive_interval=KEEP_ALIVE_S,
        )
        # On this host the port is another launcher's of this run, which answers at once, or taken.
        patience = ANSWER_S if hosts.is_here and not keeps_store else hosts.wait_s + ANSWER_S
        try:
            return within(patience, partial(get_rendezvous_handler, parameters))
        except RendezvousConnectionError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
        except TimeoutError as error:
            reason = f"what listens there is no launcher: {error}"
    raise LaunchError(
        f"--rdzv-endpoint={hosts.endpoint} cannot be reached, or its port is taken by something "
        f"else ({reason}): name a free port of a host that the others reach"
    )


@contextmanager
def guard(agent: Agent, hosts: Hosts, stop: StopRequest | None) -> Iterator[None]:
    """Inside, this process ends in bounded time though the agent hangs.

    A host that is cut off leaves its agent in a read from the store that knows no time limit and
    lets no Python handler run (11 minutes were seen). The kernel ends ranks with their launcher.
    """
    done = threading.Event()

    def watch() -> None:
        alone_since = time.monotonic()
        while not done.wait(0.5):
            now = time.monotonic()
            if agent.has_ranks():
                alone_since = now
            times = stop.times if stop is not None else []
            hangs = now - agent.looked_at > STUCK_S and now - alone_since > STUCK_S
            if times and hangs and now - times[0] > STUCK_S:
                leave(STOPPED, "nsphere: stopped while waiting for other hosts")
            if len(times) > 1 and now - times[1] > AT_ONCE_S:
                leave(128 + signal.SIGTERM, "nsphere: asked twice to stop: left at once")
            if times and now - times[0] > SHUTDOWN_TIMEOUT_S + LEAVING_S:
                leave(128 + signal.SIGTERM, "nsphere: ranks did not stop in time")
            if now - max(agent.looked_at, alone_since) > hosts.wait_s + 2 * STUCK_S:
                leave(RANK_LOST, f"nsphere: no way to {hosts.endpoint} for {hosts.wait_s:g} s")

    thread = threading.Thread(target=watch, name="nsphere-guard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _state(pid: int) -> str:
    """Letter of a process's state in /proc; Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
