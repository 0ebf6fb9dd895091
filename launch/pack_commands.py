"""`nsphere pack folder|table|rec|identities|lst|scenes`: images -> tar shards with their index."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.pack.limits import MAX_BYTES, MAX_SAMPLES, ShardLimits
from launch.progress import shard_progress

if TYPE_CHECKING:
    from data.pack.writer import Packed

pack = typer.Typer(
    help="Write tar shards from images with captions or identities.", no_args_is_help=True
)

Out = Annotated[Path, typer.Argument(help="Folder, x.tar (-> x-000000.tar ...) or a %06d pattern.")]
MaxSamples = Annotated[int, typer.Option(help="Samples of a shard at most.")]
MaxBytes = Annotated[int, typer.Option(help="Bytes of a shard at most.")]
Seed = Annotated[int, typer.Option(help="Draws the order of the images.")]
Prefix = Annotated[
    str | None,
    typer.Option(help="Call identities PREFIX/NAME; else those of digits get the folder's name."),
]
Identities = Annotated[
    Path | None, typer.Option(help="identities.tsv of an earlier pack, whose classes stay.")
]


@pack.command("folder")
def folder(
    images: Annotated[Path, typer.Argument(help="Folder of jpg, png and webp files.")],
    out: Out,
    captions: Annotated[str, typer.Option(help="beside: x.txt by x.jpg; folder: its name.")] = (
        "beside"
    ),
    seed: Seed = 0,
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
    identity_column: Annotated[
        str, typer.Option(help="Name or integer of a person: classes instead of captions.")
    ] = "",
    prefix: Prefix = None,
    identities: Identities = None,
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack the rows of a table, with captions or with identities.

    Example: nsphere pack table pairs.tsv shards/train.tar --image-column path --caption-column text
    """
    from data.pack.face_table import pack_face_table
    from data.pack.numbering import Naming
    from data.pack.table import pack_table

    if identity_column:
        with shard_progress("packing") as progress:
            faces = pack_face_table(
                rows,
                out,
                image_column=image_column,
                identity_column=identity_column,
                naming=Naming(prefix, identities),
                limits=ShardLimits(max_samples, max_bytes),
                progress=progress,
            )
        _tell(faces)
        return
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


@pack.command("rec")
def rec(
    records: Annotated[Path, typer.Argument(help="A .rec file; .idx and property beside it.")],
    out: Out,
    order: Annotated[str, typer.Option(help="shuffled, or file: as the records lie.")] = "shuffled",
    seed: Seed = 0,
    pool_mb: Annotated[int, typer.Option(help="Memory that the shuffling takes, in MiB.")] = 256,
    allow_damage: Annotated[
        bool, typer.Option("--allow-damage", help="Pack what is whole of a damaged file.")
    ] = False,
    prefix: Prefix = None,
    identities: Identities = None,
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack MXNet RecordIO of faces (insightface's train.rec), without MXNet, in bounded memory.

    Example: nsphere pack rec faces_emore/train.rec shards/train.tar
    """
    from data.errors import DataError
    from data.pack.numbering import Naming
    from data.pack.rec import pack_rec

    if order not in ("shuffled", "file"):
        raise DataError(f"--order={order}: choose shuffled or file")
    with shard_progress("packing") as progress:
        packed = pack_rec(
            records,
            out,
            order="file" if order == "file" else "shuffled",
            seed=seed,
            pool_bytes=max(1, pool_mb) << 20,
            naming=Naming(prefix, identities),
            allow_damage=allow_damage,
            limits=ShardLimits(max_samples, max_bytes),
            progress=progress,
        )
    _tell(packed)


@pack.command("identities")
def identities_(
    folder: Annotated[Path, typer.Argument(help="FOLDER/IDENTITY/... with jpg, png and webp.")],
    out: Out,
    seed: Seed = 0,
    prefix: Prefix = None,
    identities: Identities = None,
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack a folder that has one folder per identity.

    Example: nsphere pack identities casia/ shards/train.tar
    """
    from data.pack.identities import pack_identities
    from data.pack.numbering import Naming

    with shard_progress("packing") as progress:
        packed = pack_identities(
            folder,
            out,
            seed=seed,
            naming=Naming(prefix, identities),
            limits=ShardLimits(max_samples, max_bytes),
            progress=progress,
        )
    _tell(packed)


@pack.command("lst")
def lst(
    images: Annotated[Path, typer.Argument(help="Lines of index, label or labels, path.")],
    out: Out,
    root: Annotated[Path | None, typer.Option(help="Folder of the paths; else the list's.")] = None,
    prefix: Prefix = None,
    identities: Identities = None,
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack the images of an MXNet list (.lst), in its order.

    Example: nsphere pack lst train.lst shards/train.tar --root images/
    """
    from data.pack.lst import pack_lst
    from data.pack.numbering import Naming

    with shard_progress("packing") as progress:
        packed = pack_lst(
            images,
            out,
            root=root,
            naming=Naming(prefix, identities),
            limits=ShardLimits(max_samples, max_bytes),
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


def _tell(packed: "Packed") -> None:
    for line in packed.left_out:
        typer.echo(f"left out: {line}")
    first, last = packed.shards[0], packed.shards[-1]
    people = f" of {packed.num_identities:,} identities" if packed.num_identities else ""
    typer.echo(
        f"{packed.num_samples:,} samples{people} in {len(packed.shards)} shards: {first} ... {last}"
    )
