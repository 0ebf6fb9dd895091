"""Zero-shot classes: their names from a file or from captions, and prompts made of them."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.config import ConfigError
from trainer.evaluate.nearest import MAX_ID

NAME_COLUMNS = ("name", "label")  # of a TSV, first found wins


@dataclass(frozen=True)
class ClassNames:
    """One class: its integer label in the data and what it is called, in one way or several."""

    label: int
    names: tuple[str, ...]


def load_class_names(path: str) -> list[ClassNames]:
    """Classes by label from a text file (line i names class i) or a TSV (columns cls and name).

    A label on several lines of a TSV has several names. `imagenet` stands for open_clip's 1000.
    Raises ConfigError naming the file, line and column.
    """
    if path == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return [ClassNames(label, (name,)) for label, name in enumerate(IMAGENET_CLASSNAMES)]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"eval.classes = {path!r}: cannot be read: {error}") from None
    if lines and "\t" in lines[0]:
        return merge_class_names(_read_table(path, lines))
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        line = names.index("") + 1 if names else 1
        raise ConfigError(f"eval.classes = {path!r}: line {line} is empty; line i names class i")
    return [ClassNames(label, (name,)) for label, name in enumerate(names)]


def merge_class_names(names: Iterable[tuple[int, str]]) -> list[ClassNames]:
    """(label, name) rows as classes by rising label, each distinct name once, in order."""
    by_label: dict[int, dict[str, None]] = {}
    for label, name in names:
        by_label.setdefault(label, {})[name] = None
    return [ClassNames(label, tuple(by_label[label])) for label in sorted(by_label)]


def class_prompts(names: ClassNames, templates: Iterable[str]) -> list[str]:
    """Every name in every template; `openai` among the templates is open_clip's list of 80.

    Raises ConfigError for a template without `{}`.
    """
    prompts: list[str] = []
    for template in templates:
        if template == "openai":
            from open_clip import OPENAI_IMAGENET_TEMPLATES

            prompts += [fill(name) for fill in OPENAI_IMAGENET_TEMPLATES for name in names.names]
        elif "{}" in template:
            prompts += [template.replace("{}", name) for name in names.names]
        else:
            raise ConfigError(
                f"eval.templates: {template!r} has no {{}} for the class name; write "
                "'a photo of a {}.' or 'openai'"
            )
    return prompts


def _read_table(path: str, lines: list[str]) -> list[tuple[int, str]]:
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = list(rows.fieldnames or [])
    column = next((name for name in NAME_COLUMNS if name in columns), "")
    if "cls" not in columns or not column:
        raise ConfigError(
            f"eval.classes = {path!r}: needs columns cls and name (or label), "
            f"has {', '.join(columns)}"
        )
    names = []
    for number, row in enumerate(rows, start=2):
        label, name = (row["cls"] or "").strip(), (row[column] or "").strip()
        if not label.isdecimal() or int(label) > MAX_ID or not name:
            raise ConfigError(
                f"eval.classes = {path!r}: line {number}: cls must be an integer below 2^32 and "
                f"{column} not empty, they are {label!r} and {name!r}"
            )
        names.append((int(label), name))
    if not names:
        raise ConfigError(f"eval.classes = {path!r}: has a header and no classes")
    return names
