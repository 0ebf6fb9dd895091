"""Every rank looks around, rank 0 hears all of them and judges."""

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from launch.doctor import disk, facts, judge, links
from launch.doctor.facts import Facts
from launch.doctor.judge import Line, Needs
from trainer.config import Config, ConfigError, dump_config
from trainer.ranks import Ranks

ReadConfig = Callable[[], Config | None]


def examine(read_config: ReadConfig, run: Path | None, ranks: Ranks) -> list[Line]:
    """The lines of the page, the same on every rank; a collective.

    `read_config` may raise ConfigError: that is a finding, not an end. `run`: the run folder.
    """
    config, problem = None, ""
    try:
        config = read_config()
    except ConfigError as error:
        problem = str(error).splitlines()[0]
    own = _look_around(config, problem, run if ranks.is_first else None, ranks.rank)
    everyone: list[Facts] = [own] * ranks.world_size
    dist.all_gather_object(everyone, own, group=ranks.group)
    measured = links.measure_links(ranks) if ranks.world_size > 1 else []
    skew = links.clock_skew(links.read_clocks(ranks))
    # The needs are rank 0's to say: the estimate is the same everywhere, and takes seconds.
    lines: list[list[Line]] = [[]]
    if ranks.is_first:
        lines = [_judge(config, everyone, measured, skew)]
    dist.broadcast_object_list(lines, src=0, group=ranks.group)
    return lines[0]


def _judge(
    config: Config | None,
    everyone: list[Facts],
    measured: list[dict[str, float]],
    skew: float,
) -> list[Line]:
    needs, problems = Needs(), []
    if config is not None:
        try:
            needs = _needs(config, everyone)
        except (ConfigError, ValueError) as error:
            text = str(error).splitlines()[0]
            todo = "correct the configuration, or give --classes where it asks for it"
            problems = [Line("estimate", False, text, todo)]
    return [
        *judge.judge_same(everyone),
        *judge.judge_places(everyone, needs),
        *judge.judge_links(measured, link=links.network_speed(), ranks=everyone),
        judge.judge_clocks(skew),
        *judge.judge_disk(everyone[0], needs),
        *judge.judge_data(everyone),
        *problems,
    ]


def _needs(config: Config, everyone: list[Facts]) -> Needs:
    from trainer.estimate import estimate, plan_run
    from trainer.estimate.machines import this_processor

    hosts = {found.host for found in everyone}
    each = -(-len(everyone) // len(hosts))
    plan = plan_run(config, this_processor(each), nodes=len(hosts), ranks_per_node=each)
    found = estimate(plan)
    kept = config.checkpoint.keep_last + 1
    return Needs(found.shared_bytes, kept * found.checkpoint_bytes, config.data.workers)


def _look_around(config: Config | None, problem: str, run: Path | None, rank: int) -> Facts:
    names, gpu_problem, topology = facts.gpus()
    free, total = facts.shared_memory()
    files, locked = facts.limits()
    threads, cores = facts.thread_count(os.environ)
    measured, disk_problem = disk.measure_disk(run) if run is not None else ({}, "")
    shards: dict[str, str] = {}
    fingerprint = index_problem = ""
    if config is not None and config.data.all_sources():
        shards = disk.read_ends(config)
        if not any(digest.startswith("!") for digest in shards.values()):
            fingerprint, index_problem = disk.fingerprint(config)
    text = dump_config(config) if config is not None else ""
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        versions=facts.versions(),
        gpus=names,
        gpu_problem=gpu_problem,
        topology=topology,
        code=facts.code_digest(),
        config=hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if text else "",
        config_problem=problem,
        shared_free=free,
        shared_total=total,
        open_files=files,
        locked_memory=locked,
        threads=threads,
        cores=cores,
        name_problem=facts.name_problem(os.environ),
        port_problem=facts.port_problem(os.environ),
        jit_locks=facts.jit_locks(os.environ),
        disk=measured,
        disk_problem=disk_problem,
        shards=shards,
        fingerprint=fingerprint,
        index_problem=index_problem,
    )
