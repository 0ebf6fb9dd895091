"""From facts to a page: each line is `ok`, or says what is wrong and what to do."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.doctor.facts import Facts

MOST_SKEW_S = 1.0
LEAST_FILES = 4096
SLOW_SHARE = 0.3  # of a link, below which an exchange is worth a look
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Line:
    """One check."""

    name: str
    ok: bool
    found: str
    todo: str = ""

    def __str__(self) -> str:
        head = f"{'ok' if self.ok else 'TO DO':<6} {self.name:<20} {self.found}"
        return head + (f"\n       {'':<20} -> {self.todo}" if self.todo and not self.ok else "")


@dataclass(frozen=True)
class Needs:
    """What the run will ask for, by the estimate."""

    shared_bytes: int = 0  # of a node
    checkpoint_bytes: int = 0  # keep_last + 1 of them
    workers: int = 0


def page(lines: Sequence[Line]) -> str:
    """For people."""
    bad = sum(not line.ok for line in lines)
    last = "all is well" if not bad else f"{bad} of {len(lines)} lines want something done"
    return "\n".join([*map(str, lines), "", last])


def values(lines: Sequence[Line]) -> dict[str, Any]:
    """For programs."""
    return {"ok": all(line.ok for line in lines), "lines": [asdict(line) for line in lines]}


def judge_same(ranks: Sequence[Facts]) -> list[Line]:
    """Versions, code and configuration are one over all ranks."""
    lines = []
    first = ranks[0].versions
    different = [
        f"{name}: {_by_rank([facts.versions.get(name, '-') for facts in ranks])}"
        for name in first
        if len({facts.versions.get(name, "-") for facts in ranks}) > 1
    ]
    shown = ", ".join(f"{name} {number}" for name, number in first.items() if number != "-")
    lines.append(
        Line(
            "versions",
            not different,
            "; ".join(different) or shown,
            "install the same packages on every node, from one lock file or image",
        )
    )
    lines.append(
        _same("code", [facts.code for facts in ranks], "put the same checkout on every node")
    )
    problems = [
        f"rank {facts.rank}: {facts.config_problem}" for facts in ranks if facts.config_problem
    ]
    if problems:
        lines.append(Line("configuration", False, problems[0], "correct it on that node"))
    elif ranks[0].config:
        todo = "give every rank the same file and the same overrides"
        lines.append(_same("configuration", [facts.config for facts in ranks], todo))
    return lines


def judge_places(ranks: Sequence[Facts], needs: Needs) -> list[Line]:
    """GPUs, memory that is shared, limits, threads, names, ports, locks: node by node."""
    lines = [_gpus(ranks), _shared(ranks, needs)]
    few = [
        f"rank {f.rank} on {f.host}: {f.open_files}" for f in ranks if f.open_files < LEAST_FILES
    ]
    lines.append(
        Line(
            "open files",
            not few,
            few[0] if few else f"{min(f.open_files for f in ranks):,} allowed",
            f"ulimit -n {LEAST_FILES} or more: workers hold many files and sockets",
        )
    )
    tight = [f for f in ranks if f.gpus and 0 <= f.locked_memory < GIB]
    lines.append(
        Line(
            "locked memory",
            not tight,
            f"rank {tight[0].rank}: {tight[0].locked_memory // 1024} KiB" if tight else "enough",
            "ulimit -l unlimited: InfiniBand and pinned memory need it",
        )
    )
    lines.append(_threads(ranks))
    lines.append(
        _any(ranks, "name_problem", "host names", "resolve", "put the names into DNS or /etc/hosts")
    )
    lines.append(
        _any(ranks, "port_problem", "rendezvous port", "free or not set", "set a free MASTER_PORT")
    )
    stale = [f"{f.host}: {path}" for f in ranks for path in f.jit_locks]
    todo = "no build is going on? rm it: the next run would wait for it for ever"
    lines.append(Line("compiler locks", not stale, stale[0] if stale else "none is stale", todo))
    return lines


def judge_data(ranks: Sequence[Facts]) -> list[Line]:
    """Every rank reads the same shards, and finds the same index."""
    for facts in ranks:
        for shard, digest in facts.shards.items():
            if digest.startswith("!"):
                text = f"rank {facts.rank} on {facts.host}: {shard}: {digest[1:]}"
                todo = "mount or copy it there, and check permissions"
                return [Line("shards", False, text, todo)]
    lines = []
    names, ends = list(ranks[0].shards), [list(facts.shards.values()) for facts in ranks]
    for number, name in enumerate(names):
        here = [digests[number] if number < len(digests) else "none" for digests in ends]
        if len(set(here)) > 1:
            text = f"{name} is not the same file everywhere: {_by_rank(here)}"
            return [Line("shards", False, text, "copy it again where it differs")]
    if names:
        lines.append(Line("shards", True, f"{len(names)} read at both ends by every rank"))
    problems = [f for f in ranks if f.index_problem]
    if problems:
        text = f"rank {problems[0].rank}: {problems[0].index_problem}"
        lines.append(Line("index", False, text, "nsphere index SHARDS where the data lies"))
    elif ranks[0].fingerprint:
        todo = "the indexes are of different data: remove them and run nsphere index once"
        lines.append(_same("index", [f.fingerprint for f in ranks], todo))
    return lines


def judge_disk(first: Facts, needs: Needs) -> list[Line]:
    """Free space and speed for the planned checkpoints."""
    if not first.disk and not first.disk_problem:
        return []
    if first.disk_problem:
        todo = "wait for it to end, or name another --run; make the folder writable"
        return [Line("run folder", False, first.disk_problem, todo)]
    free, rate = first.disk["free"], first.disk["write"]
    wanted = needs.checkpoint_bytes
    text = (
        f"{free / GIB:.1f} GiB free, {wanted / GIB:.2f} GiB for checkpoints; {rate / MIB:.0f} MiB/s"
    )
    lines = [
        Line(
            "run folder",
            free > wanted * 1.05,
            text,
            "name a larger disk with --run, or lower checkpoint.keep_last",
        )
    ]
    return lines


def judge_links(
    measured: Sequence[dict[str, float]], *, link: float, ranks: Sequence[Facts]
) -> list[Line]:
    """All-reduce beside what the link should give; one rank has none."""
    if len(ranks) == 1:
        return [Line("all-reduce", True, "one rank: nothing to exchange")]
    best = max(line["rate"] for line in measured)
    shown = ", ".join(
        f"{line['bytes'] / MIB:g} MiB {line['rate'] / 1e9:.2f} GB/s" for line in measured
    )
    hosts = len({facts.host for facts in ranks})
    beside = f" (link {link / 1e9:.1f} GB/s)" if link else ""
    slow = bool(link) and hosts > 1 and best < SLOW_SHARE * link
    todo = "NCCL_DEBUG=INFO shows the way taken: NCCL_SOCKET_IFNAME or NCCL_IB_HCA may be wrong"
    return [Line("all-reduce", not slow, shown + beside, todo)]


def judge_clocks(skew: float) -> Line:
    """Skew of wall clocks over the ranks."""
    ok = math.isfinite(skew) and skew < MOST_SKEW_S
    todo = "start chrony or ntpd on every node: logs and timeouts are compared over nodes"
    return Line("clocks", ok, f"within {skew:.3f} s of each other", todo)


def _gpus(ranks: Sequence[Facts]) -> Line:
    problem = next((f for f in ranks if f.gpu_problem), None)
    if problem is not None:
        return Line("GPUs", False, f"{problem.host}: {problem.gpu_problem}", "see above")
    kinds = {tuple(facts.gpus) for facts in ranks}
    if kinds == {()}:
        return Line("GPUs", True, "none: ranks run on the processor")
    per_host = {facts.host: facts.gpus for facts in ranks}
    text = "; ".join(f"{host}: {len(names)} x {names[0]}" for host, names in per_host.items())
    todo = "all nodes need the same GPUs: the slowest sets the pace"
    return Line("GPUs", len(kinds) == 1, text + _linked(ranks[0].topology), todo)


def _linked(topology: str) -> str:
    if not topology:
        return ""
    words = [word for word in topology.split() if word[:2] in ("NV", "PX", "PI", "SY", "NO", "PH")]
    kinds = Counter(words)
    return "; links " + ", ".join(sorted(kinds))


def _shared(ranks: Sequence[Facts], needs: Needs) -> Line:
    least = min(ranks, key=lambda facts: facts.shared_free)
    text = f"{least.host}: {least.shared_free / MIB:,.0f} MiB free"
    text += f", the loader needs {needs.shared_bytes / MIB:,.0f}" if needs.shared_bytes else ""
    todo = (
        "docker run --shm-size, mount -o remount,size=..., or lower data.workers or data.prefetch"
    )
    return Line("/dev/shm", least.shared_free >= needs.shared_bytes, text, todo)


def _threads(ranks: Sequence[Facts]) -> Line:
    per_host: Counter[str] = Counter()
    for facts in ranks:
        per_host[facts.host] += facts.threads
    cores = {facts.host: facts.cores for facts in ranks}
    over = next((host for host, threads in per_host.items() if threads > cores[host]), None)
    if over is None:
        text = ", ".join(f"{host}: {n} on {cores[host]} cores" for host, n in per_host.items())
        return Line("threads", True, text)
    ranks_there = sum(facts.host == over for facts in ranks)
    todo = f"OMP_NUM_THREADS={max(1, cores[over] // ranks_there)}: they take turns otherwise"
    return Line("threads", False, f"{over}: {per_host[over]} on {cores[over]} cores", todo)


def _any(ranks: Sequence[Facts], name: str, title: str, good: str, todo: str) -> Line:
    for facts in ranks:
        if problem := getattr(facts, name):
            return Line(title, False, f"rank {facts.rank} on {facts.host}: {problem}", todo)
    return Line(title, True, good)


def _same(name: str, digests: Sequence[str], todo: str) -> Line:
    if len(set(digests)) == 1:
        return Line(name, True, f"the same on all {len(digests)} rank(s) ({digests[0][:8]})")
    return Line(name, False, f"differs: {_by_rank(digests)}", todo)


def _by_rank(found: Sequence[str]) -> str:
    """ "0-2 have X, 3 has Y"."""
    most = Counter(found).most_common()
    return ", ".join(
        f"{value[:12]} on rank{'s' if count > 1 else ''} "
        + ",".join(str(n) for n, other in enumerate(found) if other == value)
        for value, count in most
    )
