"""`nsphere centers list|duplicates|remove|merge|add`: the identities of a run's class centers."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.progress import shard_progress

if TYPE_CHECKING:
    from trainer.centers.edit import Edit
    from trainer.centers.files import StoredCenters

centers = typer.Typer(
    help="List, compare, remove, merge and add the identities of a run.", no_args_is_help=True
)

Source = Annotated[Path, typer.Argument(help="Run folder, a checkpoint, or a folder made here.")]
Out = Annotated[Path, typer.Argument(help="New folder, for centers.init.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
FIRST_NAMES = 5


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the console script."""
    app.add_typer(centers, name="centers")


@centers.command("list")
def list_centers(
    source: Source,
    names: Annotated[bool, typer.Option("--names", help="All names, with their rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how many identities there are, their centers' size and lengths, and their names.

    Example: nsphere centers list runs/faces --names
    """
    from trainer.centers.edit import names_of
    from trainer.centers.files import StoredCenters
    from trainer.centers.lengths import measure_lengths

    stored = StoredCenters.find(source)
    table = names_of(stored)
    with shard_progress("reading centers") as progress:
        lengths = measure_lengths(stored, progress)
    first_names = table.first_names()
    facts: dict[str, Any] = {
        "checkpoint": str(stored.folder),
        "num_classes": stored.num_classes,
        "num_names": len(table.numbers),
        "dim": stored.dim,
        "subcenters": stored.subcenters,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "steps": stored.steps,
        "tables": stored.tables,
        **lengths._asdict(),
        "first_names": first_names[:FIRST_NAMES].to_pylist(),
    }
    if as_json:
        if names:
            facts["names"] = table.names.to_pylist()
            facts["rows"] = table.numbers.tolist()
        typer.echo(json.dumps(facts))
        return
    if names:
        sys.stdout.write(table.to_tsv().decode())
        return
    sub = f" x {stored.subcenters} sub-centers" if stored.subcenters > 1 else ""
    more = ", ..." if len(first_names) > FIRST_NAMES else ""
    typer.echo(
        f"{stored.folder}\n"
        f"{stored.num_classes:,} identities with {len(table.numbers):,} names, "
        f"{stored.dim} dimensions{sub}, {facts['dtype']}, {stored.steps:,} steps\n"
        f"lengths: least {lengths.least:.4g}, mean {lengths.mean:.4g}, "
        f"largest {lengths.largest:.4g}\n"
        f"tables: {', '.join(stored.tables)}\n"
        f"names: {', '.join(facts['first_names'])}{more}"
    )


@centers.command("duplicates")
def duplicates(
    source: Source,
    top: Annotated[int, typer.Option(help="Pairs to show at most.", min=1)] = 20,
    threshold: Annotated[
        float | None, typer.Option(help="Least cosine.", min=-1.0, max=1.0)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the closest pairs of centers: likely one person under two names.

    Compares all with all. A line is name, name, cosine, with tabs: what `merge --pairs-file` takes
    when only the lines that are right are left.

    Example: nsphere centers duplicates runs/faces --top 100 --threshold 0.6 > pairs.tsv
    """
    import torch

    from trainer.centers.duplicates import closest_pairs
    from trainer.centers.edit import names_of
    from trainer.centers.files import StoredCenters

    stored = StoredCenters.find(source)
    names = names_of(stored).first_names()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with shard_progress("comparing centers") as progress:
        pairs, count = closest_pairs(
            stored, top, threshold=threshold, device=device, progress=progress
        )
    found = [([names[i].as_py() for i in pair[1:]], pair) for pair in pairs]
    if as_json:
        rows = [
            {"names": both, "rows": [pair.first, pair.second], "cosine": pair.cosine}
            for both, pair in found
        ]
        typer.echo(json.dumps({"checkpoint": str(stored.folder), "count": count, "pairs": rows}))
        return
    for both, pair in found:
        typer.echo(f"{both[0]}\t{both[1]}\t{pair.cosine:.4f}")
    reached = "" if threshold is None else f" with a cosine of {threshold:g} or more"
    sys.stderr.write(f"{len(pairs):,} of {count:,} pairs{reached}\n")


@centers.command("remove")
def remove(
    source: Source,
    out: Out,
    names: Annotated[str, typer.Option(help="Names with commas between them.")] = "",
    names_file: Annotated[Path | None, typer.Option(help="A name a line.")] = None,
) -> None:
    """Write the centers without some identities; all names of such a one go with it.

    Example: nsphere centers remove runs/faces centers/without --names "Ann Lee,Bob"
    """
    from trainer.centers.edit import remove as without
    from trainer.centers.files import StoredCenters
    from trainer.config import ConfigError

    if bool(names) == bool(names_file):
        raise ConfigError("say who is removed: --names A,B or --names-file FILE")
    asked = _split(names) if names_file is None else _read_lines(names_file)
    stored = StoredCenters.find(source)
    _write(stored, without(stored, asked), out)


@centers.command("merge")
def merge(
    source: Source,
    out: Out,
    names: Annotated[str, typer.Argument(help="Names with commas between them.")] = "",
    into: Annotated[str, typer.Option(help="The identity they become part of.")] = "",
    pairs_file: Annotated[
        Path | None, typer.Option(help="Lines of two names, with a tab: the second into the first.")
    ] = None,
) -> None:
    """Write the centers with identities made one: other names become its aliases.

    Its center is the mean of the unit centers. Labels with any of the names then train it.

    Example: nsphere centers merge runs/faces centers/merged --into "Ann Lee" "A. Lee,Ann L."
    """
    from trainer.centers.edit import merge as made_one
    from trainer.centers.files import StoredCenters
    from trainer.config import ConfigError

    if bool(names and into) == bool(pairs_file) or bool(names) != bool(into):
        raise ConfigError("say who is merged: --into NAME A,B or --pairs-file FILE")
    groups = [[into, *_split(names)]] if pairs_file is None else _read_pairs(pairs_file)
    stored = StoredCenters.find(source)
    _write(stored, made_one(stored, groups), out)


@centers.command("add")
def add(
    source: Source,
    out: Out,
    data: Annotated[list[str], typer.Option(help="Shards with images of new identities.")],
    identities: Annotated[Path, typer.Option(help="TSV: cls and name of the shards' labels.")],
    start: Annotated[
        str, typer.Option(help="mean: of the images' embeddings; random: as at a run's start.")
    ] = "mean",
    backbone: Annotated[
        Path | None, typer.Option(help="Run or checkpoint that embeds; default: the source.")
    ] = None,
) -> None:
    """Write the centers with the identities of new shards that they do not have yet.

    mean is weight imprinting (Qi et al. 2018): the new centers are right before any training.

    Example: nsphere centers add runs/faces centers/more --data "new-{0..7}.tar" --identities
    new/identities.tsv
    """
    from trainer.centers.edit import add as with_new
    from trainer.centers.edit import check_free, names_of
    from trainer.centers.files import StoredCenters
    from trainer.centers.identities import load_identities
    from trainer.centers.imprint import find_new, start_centers
    from trainer.checkpoint import load_checkpoint_config
    from trainer.config import ConfigError
    from trainer.samples import index_shards

    if start not in ("mean", "random"):
        raise ConfigError(f"--start={start}: choose mean or random")
    check_free(out)
    labels = load_identities(str(identities), "--identities")
    stored = StoredCenters.find(source)
    config = load_checkpoint_config(stored.folder)
    with shard_progress("indexing shards") as progress:
        index = index_shards(data, config, progress)
    new = find_new(index, labels, names_of(stored), str(identities))
    directions = None
    if start == "mean":
        directions = _embed_new(stored, index, new, backbone or source)
    rows = start_centers(stored, config, len(new.names), directions)
    _write(stored, with_new(stored, new.names, rows), out)


def _embed_new(stored: "StoredCenters", index: Any, new: Any, backbone: Path) -> Any:
    """Directions for new centers, by the backbone of a checkpoint."""
    import torch

    from trainer.centers.imprint import imprint
    from trainer.checkpoint import find_checkpoint, load_checkpoint_config, load_weights
    from trainer.config import ConfigError
    from trainer.export import load_faces

    checkpoint = find_checkpoint(backbone)
    if not (checkpoint / "deepspeed").is_dir():
        raise ConfigError(
            f"{checkpoint} holds centers alone: give --backbone RUN, the run that they are from, "
            "or --start random"
        )
    config = load_checkpoint_config(checkpoint)
    if not config.has_centers or config.model.embedding_dim != stored.dim:
        raise ConfigError(
            f"--backbone {checkpoint}: model.name = {config.model.name!r} with embeddings of "
            f"{config.model.embedding_dim}, the centers have {stored.dim} dimensions"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_faces(load_weights(checkpoint, ema=True), config.model, device=device)
    with shard_progress("embedding new identities") as progress:
        return imprint(model, index, new, config, device=device, progress=progress)


def _write(stored: "StoredCenters", edit: "Edit", out: Path) -> None:
    from trainer.centers.edit import write_centers

    with shard_progress("writing centers") as progress:
        write_centers(stored, edit, out, progress)
    typer.echo(
        f"{out}: {edit.num_classes:,} identities with {len(edit.names.numbers):,} names, of "
        f"{stored.num_classes:,} in {stored.folder}\n"
        f"a run starts from them with --centers.init={out} and the backbone they are from"
    )


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _read_lines(path: Path) -> list[str]:
    from trainer.config import ConfigError

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"{path}: names nobody")
    return found


def _read_pairs(path: Path) -> Sequence[Sequence[str]]:
    from trainer.config import ConfigError

    pairs = [line.split("\t")[:2] for line in _read_lines(path)]
    for pair in pairs:
        if len(pair) < 2:
            raise ConfigError(f"{path}: {pair[0]!r}: a line is two names with a tab between them")
    return pairs
