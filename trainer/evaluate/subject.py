"""What a task gets: the embedded samples, and the tables that say what to do with them."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch.distributed import ProcessGroup

from trainer.config import EvalConfig
from trainer.evaluate.identification import Roles
from trainer.evaluate.ijb import Protocol
from trainer.evaluate.roc import Curve
from trainer.evaluate.towers import Embedded, Tokenizer, Towers
from trainer.evaluate.verification import Pairs


class Tables(NamedTuple):
    """The tables of `[eval]`, looked up in the samples; None where a task does not need one."""

    pairs: Pairs | None = None
    roles: Roles | None = None
    protocol: Protocol | None = None


@dataclass(frozen=True)
class Subject:
    """One set of samples under evaluation, on this rank."""

    towers: Towers
    embedded: Embedded
    tokenizer: Tokenizer | None
    config: EvalConfig
    tables: Tables
    group: ProcessGroup | None
    curves: dict[str, Curve] = field(default_factory=dict)
    """ROC by task, from the tasks that have one."""
