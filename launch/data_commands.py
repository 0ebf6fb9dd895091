"""The commands about data: `nsphere index`, `nsphere order`, `nsphere pack ...`."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from launch import pack_xmc
from launch.pack_commands import pack
from launch.progress import shard_progress


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the console script."""
    app.command("index")(index)
    app.command(
        "order", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
    )(order)
    pack_xmc.register(pack)
    app.add_typer(pack, name="pack")


def join_overrides(arguments: list[str]) -> list[str]:
    """`--a.b=c` and `--a.b c` alike as `--a.b=c`; further words are further values of the key.

    What is neither is handed on as it is: `load_config` says how an override is written.
    """
    joined: list[str] = []
    key, bare = "", False  # the last key, and whether it still waits for a value
    for word in arguments:
        if word.startswith("--"):
            joined.append(word)
            key, bare = word.partition("=")[0], "=" not in word
        elif bare:
            joined[-1] = f"{key}={word}"
            bare = False
        else:
            joined.append(f"{key}={word}")
    return joined


def index(
    shards: Annotated[list[str], typer.Argument(help="Tar shards, braces and :: lists too.")],
    image_key: Annotated[str, typer.Option(help="Endings of the image.")] = "jpg;jpeg;png;webp",
    caption_key: Annotated[
        str | None, typer.Option(help="Ending of the caption, or json:NAME; txt if there is one.")
    ] = None,
    label_key: Annotated[str, typer.Option(help="Ending of an integer label.")] = "cls",
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Scan shards anew that are indexed.")] = False,
) -> None:
    """Read each tar's headers once and write its Parquet index; lists what is wrong with it.

    Example: nsphere index "/datasets/emoji/train-{000000..000007}.tar"
    """
    from data.index import build_index
    from data.rows import Keys
    from data.shards import expand_shards

    keys = Keys(image_key, "txt" if caption_key is None else caption_key, label_key)
    required = [key for key in (keys.image, caption_key and keys.caption_ending) if key]
    with shard_progress("indexing shards") as progress:
        found = build_index(
            expand_shards(shards),
            required=required,
            keys=keys,
            fresh=fresh,
            workers=workers,
            progress=progress,
        )
    for problem in found.problems:
        typer.echo(str(problem))
    counts = Counter(problem.kind for problem in found.problems)
    size = sum(max(shard.size_bytes, 0) for shard in found.shards)
    problems = ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"
    typer.echo(
        f"{len(found.shards)} shards, {len(found):,} samples, {size / 1e6:,.1f} MB, "
        f"fingerprint {found.fingerprint[:16]}; problems: {problems}"
    )


def order(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="TOML file; or only --data.shards.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Mixing quality.")] = False,
    step: Annotated[int, typer.Option(help="Show the samples of this step, 1-based.")] = 1,
    run: Annotated[Path | None, typer.Option(help="Run with planned batches: its plans.")] = None,
) -> None:
    """Show which samples a step trains on, or how well the order mixes the shards; with `--run`, by
    the plans of that run's newest checkpoint, and what they cost to read.

    Example: nsphere order configs/smoke.toml --report
    """
    from data.order import report as mixing_report
    from trainer.config import load_config, load_overrides
    from trainer.samples import build_samples

    overrides = join_overrides(context.args)
    settings = load_config(config, overrides) if config else load_overrides(overrides)
    with shard_progress("indexing shards") as progress:
        samples = build_samples(settings, progress)
    batch = settings.train.global_batch_size
    if run is not None:
        from trainer.planning.report import describe_plans, load_plans

        load_plans(run, samples)
        if report:
            for line in describe_plans(samples, settings):
                typer.echo(line)
            return
    if not report:
        for key in samples.keys(samples.batch(step - 1, batch).ids):
            typer.echo(key)
        return
    if samples.identity_orders:
        for line in samples.describe_identities(batch):
            typer.echo(line)
        return
    for source, ordered in enumerate(samples.orders):
        size = batch if len(samples.orders) == 1 else samples.mix.largest_quota(source, batch)
        mixing = mixing_report(ordered, size)
        typer.echo(
            f"source {source + 1}: {mixing.num_samples:,} samples in {mixing.num_shards:,} shards, "
            f"{mixing.resident_samples:,} mixed at a time\n"
            f"  distinct shards in a batch of {size:,}: first {mixing.first}, mean "
            f"{mixing.mean:.1f}, worst {mixing.worst}; full permutation {mixing.ideal:.1f} "
            f"(ratio {mixing.ratio:.1%})"
        )
    sys.stdout.flush()
