"""`nsphere pack xmc`: texts with lists of labels -> tar shards with their index and label table."""

from pathlib import Path
from typing import Annotated

import typer

from data.pack.limits import MAX_BYTES, MAX_SAMPLES, ShardLimits
from launch.pack_commands import MaxBytes, MaxSamples, Out
from launch.progress import shard_progress

_LABEL_DOCUMENTS = ("none", "self", "closure", "implied")
_FORMATS = ("auto", "parquet", "json", "sparse", "bag", "npz")


def register(pack: typer.Typer) -> None:
    """Add the command to `nsphere pack`."""
    pack.command("xmc")(xmc)


def xmc(  # noqa: PLR0913 - the options of a command line
    documents: Annotated[
        Path,
        typer.Argument(
            help=".parquet; trn.json[.gz]; trn_X_Y.txt; `rows features labels` bags; Y.trn.npz."
        ),
    ],
    out: Out,
    format_: Annotated[
        str, typer.Option("--format", help=" | ".join(_FORMATS) + ": by name and first line.")
    ] = "auto",
    text_columns: Annotated[
        str, typer.Option(help="Columns or fields joined to the text; text, or title,content.")
    ] = "",
    labels_column: Annotated[str, typer.Option(help="Parquet: list of integers.")] = "labels",
    key_column: Annotated[str, typer.Option(help="Keys of the samples; else row numbers.")] = "",
    texts: Annotated[
        Path | None, typer.Option(help="sparse, npz: a text a line; else trn_X.txt beside.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="sparse, npz: features in the place of texts.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Names of features, a line each; else f0, f1, ...")
    ] = None,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="Name a feature as often as its value; else once.")
    ] = False,
    label_texts: Annotated[
        Path | None, typer.Option(help="Else Y.txt, lbl.json or labels.tsv beside.")
    ] = None,
    label_columns: Annotated[str, typer.Option(help="Its columns joined to a label's text.")] = "",
    labels: Annotated[
        Path | None, typer.Option(help="labels.parquet of the training split, for other splits.")
    ] = None,
    missing_text: Annotated[
        str, typer.Option(help="error | number: a label without text is called by its number.")
    ] = "error",
    empty: Annotated[str, typer.Option(help="drop | keep documents without labels.")] = "drop",
    label_documents: Annotated[
        str,
        typer.Option(
            help="Label texts as documents with labels: none | self | closure: it and those that "
            "it implies | implied: those alone."
        ),
    ] = "none",
    document_columns: Annotated[
        str, typer.Option(help="Columns that make such a document's text, if not the label's.")
    ] = "",
    closure: Annotated[
        float, typer.Option(help="Share of a label's documents that an implied one has too.")
    ] = 0.9,
    filter_list: Annotated[
        Path | None, typer.Option("--filter", help="filter_labels_test.txt: kept by the shards.")
    ] = None,
    max_samples: MaxSamples = MAX_SAMPLES,
    max_bytes: MaxBytes = MAX_BYTES,
) -> None:
    """Pack texts that have several labels each, with labels.parquet beside them.

    Example: nsphere pack xmc trn.json.gz shards/train.tar --text-columns title

    Example: nsphere pack xmc tst.json.gz shards/test.tar --labels shards/labels.parquet
    """
    from data.pack.xmc import Labelling, XmcPacked, pack_xmc
    from data.pack.xmc_rows import Reading

    reading = Reading(
        format=_choice("format", format_, _FORMATS),  # type: ignore[arg-type]
        text_columns=_names(text_columns),
        labels_column=labels_column,
        key_column=key_column,
        texts=texts,
        features=features,
        vocabulary=vocabulary,
        repeat=repeat,
    )
    labelling = Labelling(
        texts=label_texts,
        columns=_names(label_columns),
        table=labels,
        missing_text=_choice("missing-text", missing_text, ("error", "number")),  # type: ignore[arg-type]
        empty=_choice("empty", empty, ("drop", "keep")),  # type: ignore[arg-type]
        documents=_choice("label-documents", label_documents, _LABEL_DOCUMENTS),  # type: ignore[arg-type]
        document_columns=_names(document_columns),
        share=closure,
    )
    with shard_progress("packing") as progress:
        done: XmcPacked = pack_xmc(
            documents,
            out,
            reading=reading,
            labelling=labelling,
            filter_list=filter_list,
            limits=ShardLimits(max_samples, max_bytes),
            progress=progress,
        )
    for line in done.notes:
        typer.echo(line)
    shards, own = done.packed.shards, done.num_label_documents
    further = f", {own:,} of them label texts," if own else ""
    typer.echo(
        f"{done.packed.num_samples:,} texts{further} with {done.num_positives:,} labels "
        f"of {done.num_labels:,} ({done.table}) in {len(shards)} shards: {shards[0]} ... "
        f"{shards[-1]}"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def _choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    from data.errors import DataError

    if value not in choices:
        raise DataError(f"--{option}={value}: choose {', '.join(choices)}")
    return value
