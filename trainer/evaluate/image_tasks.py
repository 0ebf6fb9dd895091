"""Tasks on images alone: who is the same, who is who. Captions play no part."""

import numpy as np
import torch

from data.errors import DataError
from data.index import Index
from trainer.collectives import gather_counts, gather_rows
from trainer.config import ConfigError, EvalConfig
from trainer.evaluate.all_pairs import all_pairs
from trainer.evaluate.identification import Roles, first_enrols, identification
from trainer.evaluate.ijb import Flags, ijb
from trainer.evaluate.ijb_tables import load_protocol
from trainer.evaluate.recall import leave_one_out
from trainer.evaluate.subject import Subject, Tables
from trainer.evaluate.tables import load_pairs, load_roles
from trainer.evaluate.verification import verification


def load_tables(config: EvalConfig, index: Index) -> Tables:
    """The tables that `config.tasks` need, and whether the samples have what they ask for.

    Raises ConfigError for a table that is not named, DataError for one that does not fit.
    """
    _check_labels(config, index)
    if "verification" in config.tasks and not config.pairs:
        raise ConfigError(
            "eval.tasks: verification needs pairs: name a table (--eval.pairs=pairs.tsv), or give "
            "a .bin set as --data"
        )
    if "ijb" in config.tasks and not config.ijb:
        raise ConfigError("eval.tasks: ijb needs its tables: --eval.ijb=IJBC/meta")
    return Tables(
        pairs=load_pairs(config.pairs, index) if "verification" in config.tasks else None,
        roles=load_roles(config.gallery, index)
        if "identification" in config.tasks and config.gallery
        else None,
        protocol=load_protocol(config.ijb, index, scores=config.ijb_score)
        if "ijb" in config.tasks
        else None,
    )


def evaluate_recall(subject: Subject) -> dict[str, float]:
    """Every labelled image among all others."""
    embedded = subject.embedded
    return leave_one_out(embedded.images, embedded.ids, embedded.labels, subject.group)


def evaluate_verification(subject: Subject) -> dict[str, float]:
    """The pairs of a table."""
    if subject.tables.pairs is None:
        raise ConfigError("eval.tasks: verification needs pairs")
    numbers, roc = verification(
        subject.embedded.images,
        subject.embedded.ids,
        subject.tables.pairs,
        subject.group,
        fars=subject.config.fars,
    )
    subject.curves["verification"] = roc.curve()
    return numbers


def evaluate_identification(subject: Subject) -> dict[str, float]:
    """Probes among those enrolled, by a table or by the rule."""
    numbers, roc = identification(
        subject.embedded.images,
        subject.embedded.ids,
        subject.tables.roles or _roles_by_rule(subject),
        subject.group,
        fpirs=subject.config.fpirs,
    )
    if roc is not None:
        subject.curves["identification"] = roc.curve()
    return numbers


def evaluate_all_pairs(subject: Subject) -> dict[str, float]:
    """Every labelled image with every other."""
    embedded = subject.embedded
    numbers, curve = all_pairs(
        embedded.images, embedded.labels, subject.group, fars=subject.config.fars
    )
    subject.curves["all_pairs"] = curve
    return numbers


def evaluate_ijb(subject: Subject) -> dict[str, float]:
    """IJB's pairs of templates."""
    if subject.tables.protocol is None:
        raise ConfigError("eval.tasks: ijb needs its tables")
    config, embedded = subject.config, subject.embedded
    numbers, roc = ijb(
        embedded.images * embedded.norms[:, None],
        embedded.ids,
        subject.tables.protocol,
        subject.group,
        flags=Flags(norm=config.ijb_norm, score=config.ijb_score, flip=config.flip),
        fars=config.fars,
        num_replicates=config.bootstrap,
        seed=config.seed,
    )
    subject.curves["ijb"] = roc.curve()
    return numbers


def _roles_by_rule(subject: Subject) -> Roles:
    columns = torch.stack([subject.embedded.ids, subject.embedded.labels], dim=1)
    counts = gather_counts(len(columns), subject.group, columns.device)
    ids, labels = gather_rows(columns, counts, subject.group).cpu().numpy().T
    config = subject.config
    return first_enrols(ids, labels, non_mated=config.non_mated, seed=config.seed)


def _check_labels(config: EvalConfig, index: Index) -> None:
    by_label: list[str] = [task for task in config.tasks if task in ("recall", "all_pairs")]
    if "identification" in config.tasks and not config.gallery:
        by_label.append("identification")
    if by_label and not any((np.asarray(part) >= 0).any() for part in index.iter_column("label")):
        raise DataError(
            f"eval.tasks: {by_label[0]} needs labels, and no sample of {index.shards[0].url} has "
            "one: set data.label_key to the ending of the label member"
        )
