"""The whole configuration as frozen typed models: TOML and `--section.key=value` in, TOML out.

A key that does not exist is an error with the nearest ones that do, and all errors are reported
at once. The resolved configuration is written into the run folder and is itself a valid input.
"""

import difflib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from data.config import DataConfig, NegativesConfig
from trainer.centers_section import CentersConfig
from trainer.eval_section import EvalConfig, HnswConfig, NeighboursConfig
from trainer.model_section import ModelConfig
from trainer.sections import (
    CENTER_LOSSES,
    LABEL_LOSSES,
    CheckpointConfig,
    Config,
    LabelsConfig,
    LaunchConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    ScheduleConfig,
    SpikesConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "CENTER_LOSSES",
    "LABEL_LOSSES",
    "CentersConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "HnswConfig",
    "LabelsConfig",
    "LaunchConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "NegativesConfig",
    "NeighboursConfig",
    "OptimConfig",
    "ScheduleConfig",
    "SpikesConfig",
    "TrainConfig",
    "ZeroConfig",
    "differing_keys",
    "dump_config",
    "load_config",
    "load_overrides",
    "parse_config",
]


class ConfigError(ValueError):
    """The configuration is wrong; the text names every key that is, and what to do."""


def load_config(
    path: Path | str,
    overrides: list[str] | None = None,
    *,
    commands: Literal["refuse", "drop", "keep"] = "refuse",
) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, check everything at once.

    `commands`: what becomes of `pipe:COMMAND` in the file, which may come from elsewhere; overrides
    are the user's own and may have them. Raises ConfigError naming the file and every bad key, with
    the nearest known ones.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")])
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    if commands != "keep":
        tree = _without_commands(tree, "", path if commands == "refuse" else None)
    for name, texts in _group_overrides(overrides or []).items():
        _apply_override(tree, name, texts)
    _find_model_file(tree, path.parent)
    return parse_config(tree, str(path))


def _without_commands(item: Any, key: str, refusing: Path | None) -> Any:
    """The tree with empty texts for shell commands; ConfigError for them if `refusing` a file."""
    if isinstance(item, dict):
        return {k: _without_commands(v, f"{key}.{k}", refusing) for k, v in item.items()}
    if isinstance(item, list):
        return [_without_commands(value, key, refusing) for value in item]
    if not isinstance(item, str) or not re.search(r"(^|::)\s*pipe:", item):
        return item
    if refusing is not None:
        name = key.removeprefix(".")
        raise ConfigError(
            f"{refusing}: {name} = {item!r} is a shell command, and a file must not run any: give "
            f"it on the command line, --{name}={shlex.quote(item)}"
        )
    return ""


def load_overrides(overrides: list[str]) -> Config:
    """The defaults with `section.key=value` overrides, for commands that need no file."""
    tree: dict[str, Any] = {}
    for name, texts in _group_overrides(overrides).items():
        _apply_override(tree, name, texts)
    return parse_config(tree, "command line")


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Check a tree of plain values; `origin` is the file or place named in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _group_overrides(overrides: list[str]) -> dict[str, list[str]]:
    """Values by key. A shell makes of x-{0..7}.tar an override a shard: they belong together."""
    grouped: dict[str, list[str]] = {}
    for override in overrides:
        name, equals, text = override.lstrip("-").partition("=")
        if not equals or "." not in name:
            raise ConfigError(f"{override}: an override is written --section.key=value")
        grouped.setdefault(name, []).append(text)
    return grouped


def _apply_override(tree: dict[str, Any], name: str, texts: list[str]) -> None:
    *sections, key = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{name}: {section} is a value, not a section")
    if len(texts) > 1 and not key.endswith("shards"):
        raise ConfigError(f"--{name} is given {len(texts)} times: {', '.join(texts)}")
    tree[key] = texts if len(texts) > 1 else _parse_value(texts[0])


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --model.name=ViT-B-32


def _find_model_file(tree: dict[str, Any], folder: Path) -> None:
    """A model file that is not found from here is looked for from the configuration's folder."""
    model = tree.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and name.endswith(".json") and not Path(name).exists():
        beside = folder / name
        if beside.exists():
            tree["model"] = {**tree["model"], "name": str(beside)}


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = sorted(_known_keys(Config))
        near = difflib.get_close_matches(where, known, n=3, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == where.rsplit(".", 1)[-1]]
        return f"unknown key {where}; nearest: {', '.join(near) if near else 'none'}"
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{where} = {item['input']!r}: {text}" if where else text


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += _known_keys(annotation, f"{prefix}{name}.")
        keys.append(prefix + name)
    return keys


def dump_config(config: Config) -> str:
    """The configuration as TOML text that `load_config` reads back to an equal value."""
    tree = config.model_dump(mode="json", exclude_none=True)
    return "\n".join(_dump_table(name, table) for name, table in tree.items())


def _dump_table(name: str, table: dict[str, Any]) -> str:
    lines, nested = [f"[{name}]"], []
    for key, value in table.items():
        if isinstance(value, dict):
            nested.append(_dump_table(f"{name}.{key}", value))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            nested += [
                "\n".join(
                    [f"[[{name}.{key}]]", *(f"{k} = {_dump_value(v)}" for k, v in row.items())]
                )
                + "\n"
                for row in value
            ]
        else:
            lines.append(f"{key} = {_dump_value(value)}")
    return "\n".join(["\n".join(lines) + "\n", *nested])


def _dump_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_dump_value(item) for item in value) + "]"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\' or ord(c) == 127 else c for c in value
        )
        return f'"{escaped}"'
    return repr(value)


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configurations differ, each with both values."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for key, value in tree.items():
            rows.update(
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return rows

    a, b = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in a | b if a.get(key) != b.get(key)]
