"""The console script `nsphere`: parse, call, print. `nsphere COMMAND --help` shows an example.

Heavy modules are imported inside the commands: help and errors of the command line come at once,
and a rank's signal handlers stand before torch is loaded.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch import centers_commands, data_commands, doctor_command, estimate_command, slurm_commands
from launch.job import tell_failure
from launch.signals import BAD_INPUT, OWN_ERROR, StopRequest, die_with_parent

app = typer.Typer(
    help=__doc__.splitlines()[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_commands.register(app)
centers_commands.register(app)
slurm_commands.register(app)
estimate_command.register(app)
doctor_command.register(app)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file, see configs/.")],
    nproc: Annotated[
        int, typer.Option(help="Ranks on this machine; 0: one per GPU, or one.", min=0)
    ] = 0,
    run: Annotated[
        Path | None, typer.Option("--run", "--run-dir", help="Run folder; default runs/NAME.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto: go on with the folder's run; never.")] = "auto",
    nnodes: Annotated[str, typer.Option(help="Hosts: N, or MIN:MAX.")] = "1",
    rdzv_endpoint: Annotated[
        str, typer.Option(help="HOST:PORT of one of the hosts, the same on each.")
    ] = "",
) -> None:
    """Train, or go on with the run in the folder. Any key: --section.key=value.

    Example: nsphere train configs/clip_emoji.toml --data.shards=/datasets/emoji/train-{0..7}.tar
    --nproc 2 --run runs/emoji

    On several hosts, the same on each: nsphere train CONFIG --nnodes 4 --nproc 8
    --rdzv-endpoint node1:29400; with --nnodes 2:4 the run goes on with fewer, and takes in more.

    Also as a rank: torchrun --nproc-per-node 2 -m launch.cli train CONFIG, srun, accelerate launch.
    torchrun takes --run for an abbreviation of its own: write --run-dir there.
    """
    _stop.install()  # before torch is imported, which takes seconds
    from launch import runs

    if resume not in ("auto", "never"):
        _fail(f"--resume={resume}: choose auto or never")
    folder = run or Path("runs") / config.stem
    overrides = data_commands.join_overrides(context.args)
    if runs.is_one_of_several():
        if nproc or nnodes != "1":
            _fail("--nproc and --nnodes start ranks, and this is one already: leave them out")
        goes_on = resume == "auto" or runs.is_started_again()
        _leave(runs.train_rank(config, overrides, folder, goes_on, _stop))
    code = runs.train(
        config, overrides, folder, resume == "auto", nproc, nnodes, rdzv_endpoint, _stop
    )
    raise typer.Exit(code)


@app.command("eval", context_settings=OVERRIDES)
def evaluate(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint in it.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Shards, .bin sets; default data.val_shards.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="retrieval, zero_shot, recall, verification, identification, all_pairs, ijb, xmc."
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(help="Ranks on this machine; 0: one per GPU.", min=0)] = 0,
) -> None:
    """Evaluate a run or checkpoint; the last line of stdout is one JSON object.

    Example: nsphere eval runs/emoji --task zero_shot --data "/datasets/emoji/val-{0..1}.tar"
    --eval.classes=/datasets/emoji/classes.tsv

    Faces: nsphere eval runs/faces --task recall --task verification --data "val-*.tar"
    --eval.pairs=val_pairs.tsv --eval.flip=true; or --task verification --data lfw.bin

    Labels: nsphere eval runs/wordnet --task xmc --data "val-*.tar" --eval.predictions=val.parquet;
    with millions of labels --eval.index=hnsw, whose recall is told beside the figures
    """
    from launch import runs

    overrides = data_commands.join_overrides(context.args)
    if data:
        overrides += [f"--data.val_shards={shards}" for shards in data]
    if task:
        overrides.append(f"--eval.tasks={json.dumps(task)}")
    if runs.is_one_of_several() or nproc in (0, 1):
        results = runs.evaluate_rank(source, overrides)
        if results is not None:
            typer.echo(json.dumps(results))
        return
    raise typer.Exit(runs.evaluate(source, overrides, nproc))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint in it.")],
    out: Annotated[Path, typer.Argument(help="Folder (open_clip) or file (the others).")],
    format: Annotated[
        str,
        typer.Option(help="open_clip, safetensors, onnx, centers, labels; default: what fits."),
    ] = "",
    ema: Annotated[bool, typer.Option(help="Averaged weights, where the run keeps some.")] = True,
    pixels: Annotated[str, typer.Option("--input", help="ONNX: uint8 or float.")] = "uint8",
    normalise: Annotated[bool, typer.Option(help="ONNX: mean and std inside the graph.")] = True,
    flip: Annotated[bool, typer.Option(help="ONNX: add the mirror image's embedding.")] = False,
) -> None:
    """Write the weights for people without nsphere.

    Example: nsphere export runs/emoji exported/emoji, then in Python
    open_clip.create_model_and_transforms("local-dir:exported/emoji")

    Faces: nsphere export runs/faces faces.onnx --format onnx --flip
    """
    from trainer.export.formats import export_checkpoint
    from trainer.export.onnx_file import OnnxOptions

    if pixels not in ("uint8", "float"):
        _fail(f"--input={pixels}: choose uint8 or float")
    onnx = OnnxOptions(uint8=pixels == "uint8", normalise=normalise, flip=flip)
    typer.echo(export_checkpoint(source, out, format, onnx, ema=ema))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, of a run that goes on or has ended.")],
) -> None:
    """Write RUN/report.html: plots of loss, learning rate, scale, speed and cosines.

    Example: nsphere report runs/emoji
    """
    from trainer.report import write_report

    typer.echo(f"report: {write_report(run)}")


@app.command(context_settings=OVERRIDES)
def config(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file.")],
) -> None:
    """Print the configuration with every default and override resolved, as valid TOML.

    Example: nsphere config configs/smoke.toml --optim.lr=3e-4
    """
    from trainer.config import dump_config, load_config

    overrides = data_commands.join_overrides(context.args)
    typer.echo(dump_config(load_config(config, overrides)), nl=False)


def _leave(code: int) -> NoReturn:
    """End a rank whose work is done and on the disk, without tearing the interpreter down.

    Threads of the libraries that are still about then abort the process now and then
    ("terminate called without an active exception", exit code 134): a finished run would look
    failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"nsphere: {text}\n")
    raise typer.Exit(BAD_INPUT)


_stop = StopRequest()


def main() -> None:
    """Run a command; what the user can mend is one line an error on stderr, and exit code 2."""
    # Large tensors in huge pages: where each step makes them anew, page faults cost more than sums.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        _call()
    except SystemExit as ended:
        tell_failure(ended.code)
        raise
    except BaseException:
        tell_failure(OWN_ERROR)
        raise


def _call() -> None:
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        from data.errors import DataError
        from launch.ranks import LaunchError
        from trainer.checkpoint import CheckpointError
        from trainer.config import ConfigError
        from trainer.loop import TrainingError

        if isinstance(error, TrainingError):
            code = 1
        elif isinstance(error, (DataError, ConfigError, CheckpointError, LaunchError)):
            code = BAD_INPUT
        else:
            raise
        rank = os.environ.get("RANK", "0")
        own = isinstance(error, (DataError, LaunchError))  # of the rest every rank finds the same
        if rank == "0" or own:
            name = "nsphere" if rank == "0" else f"nsphere, rank {rank}"
            sys.stderr.writelines(f"{name}: {line}\n" for line in str(error).splitlines())
        sys.exit(code)


if __name__ == "__main__":
    main()
