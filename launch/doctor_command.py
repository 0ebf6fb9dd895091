"""`nsphere doctor`: one page before a queue slot is burnt."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.data_commands import join_overrides

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings=OVERRIDES)(doctor)


def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; none: the machines alone.")
    ] = None,
    nproc: Annotated[
        int, typer.Option(help="Ranks on this machine; 0: one per GPU, or one.", min=0)
    ] = 0,
    run: Annotated[
        Path | None, typer.Option("--run", "--run-dir", help="Run folder; default runs/NAME.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check machines, links, disk, shards and that all ranks agree; each line ok or what to do.

    Alone, or as ranks like `train`: srun python -P -m launch.cli doctor CONFIG checks every node of
    an allocation. Exit code 0 where all is well, 1 where something is to be done.

    Example: nsphere doctor configs/clip_emoji.toml --nproc 2
    --data.shards=/datasets/emoji/train-{0..7}.tar
    """
    overrides = join_overrides(context.args)
    from launch.runs import is_one_of_several

    if is_one_of_several() or nproc == 1:
        sys.exit(_examine(config, overrides, run, as_json=as_json))
    import torch

    ranks = nproc or max(1, torch.cuda.device_count())
    if ranks == 1:
        sys.exit(_examine(config, overrides, run, as_json=as_json))
    from launch.local import run_local

    words = ["doctor", *([str(config)] if config else []), *overrides]
    words += ["--run", str(run)] if run else []
    words += ["--json"] if as_json else []
    sys.exit(run_local(ranks, words))


def _examine(config: Path | None, overrides: list[str], run: Path | None, *, as_json: bool) -> int:
    """As one rank of the group that the environment describes; rank 0 prints. The exit code."""
    from launch.doctor import examine, page
    from launch.doctor.judge import values
    from launch.ranks import open_ranks
    from trainer.config import load_config

    folder = run or (Path("runs") / config.stem if config is not None else None)
    with open_ranks(os.environ) as ranks:
        lines = examine(
            lambda: load_config(config, overrides) if config is not None else None, folder, ranks
        )
        if ranks.is_first:
            typer.echo(json.dumps(values(lines)) if as_json else page(lines))
    return 0 if all(line.ok for line in lines) else 1
