"""`nsphere pack folder|table|scenes`: images and captions -> tar shards with their index."""

from pathlib import Path
from typing import Annotated

import typer

from data.pack.writer import MAX_BYTES, MAX_SAMPLES, Packed
from launch.progress import shard_progress

pack = typer.Typer(help="Write tar shards from images and captions.", no_args_is_help=True)

Out = Annotated[Path, typer.Argument(help="Folder, x.tar (-> x-000000.tar ...) or a %06d pattern.")]
MaxSamples = Annotated[int, typer.Option(help="Samples of a shard at most.")]
MaxBytes = Annotated[int, typer.Option(help="Bytes of a shard at most.")]


@pack.command("folder")
def folder(
    images: Annotated[Path, typer.Argument(help="Folder of jpg, png and webp files.")],
    out: Out,
    captions: Annotated[str, typer.Option(help="beside: x.txt by x.jpg; folder: its name.")] = (
        "beside"
    ),
    seed: Annotated[int, typer.Option(help="Draws the order of the images.")] = 0,
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack a folder of images, captions beside them or from folder names.

    Example: nsphere pack folder photos/ shards/train.tar --captions folder
    """
    from data.errors import DataError
    from data.pack.folder import pack_folder

    if captions not in ("beside", "folder"):
        raise DataError(f"--captions={captions}: choose beside or folder")
    with shard_progress("packing") as progress:
        packed = pack_folder(
            images,
            out,
            captions="folder" if captions == "folder" else "beside",
            seed=seed,
            max_samples=max_samples,
            max_bytes=max_bytes,
            progress=progress,
        )
    _tell(packed)


@pack.command("table")
def table(
    rows: Annotated[Path, typer.Argument(help="CSV, TSV or Parquet.")],
    out: Out,
    image_column: Annotated[str, typer.Option(help="Path, or bytes in Parquet.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Text, or a list of texts.")] = "caption",
    label_column: Annotated[str, typer.Option(help="Integer class, if any.")] = "",
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack the rows of a table.

    Example: nsphere pack table pairs.tsv shards/train.tar --image-column path --caption-column text
    """
    from data.pack.table import pack_table

    with shard_progress("packing") as progress:
        packed = pack_table(
            rows,
            out,
            image_column=image_column,
            caption_column=caption_column,
            label_column=label_column,
            max_samples=max_samples,
            max_bytes=max_bytes,
            progress=progress,
        )
    _tell(packed)


@pack.command("scenes")
def scenes(
    out: Out,
    count: Annotated[int, typer.Option(help="Scenes to draw.")] = 4096,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 64,
    max_samples: MaxSamples = 512,
) -> None:
    """Draw scenes of colored shapes with compositional captions: a set to try things on.

    Example: nsphere pack scenes shards/train.tar --count 4096
    """
    from data.pack.scenes import iter_scenes
    from data.pack.writer import pack_iterable

    with shard_progress("drawing") as progress:
        packed = pack_iterable(
            iter_scenes(count, seed, size),
            out,
            max_samples=max_samples,
            total=count,
            progress=progress,
        )
    _tell(packed)


def _tell(packed: Packed) -> None:
    for line in packed.left_out:
        typer.echo(f"left out: {line}")
    first, last = packed.shards[0], packed.shards[-1]
    typer.echo(f"{packed.num_samples:,} samples in {len(packed.shards)} shards: {first} ... {last}")
