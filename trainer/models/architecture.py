"""From `model.name` and `model.pretrained` to an open_clip architecture: names, files, hub, errors.

Nothing is built here; `trainer/models/build.py` does that. open_clip's own registry is read and
never changed, so a JSON file cannot shadow a built-in name.
"""

import difflib
import json
import socket
import urllib.request
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import huggingface_hub
import open_clip
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH

from data.augment import ResizeMode
from data.text import TokenizerSpec
from trainer.config import ConfigError

HUB, LOCAL = "hf-hub:", "local-dir:"
WEIGHTS_NAMES = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
OFFLINE = (
    "it is not on this machine and could not be downloaded; where there is a network, run"
    " `hf download {repo}`, then either give the local path or bring the Hugging Face cache along"
    " (HF_HOME) and set HF_HUB_OFFLINE=1"
)


@dataclass(frozen=True)
class Preprocess:
    """How a decoded image becomes the tower's input; `mean`, `std` are of values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: ResizeMode


@dataclass(frozen=True)
class Architecture:
    """An open_clip model description, ready to be built."""

    name: str
    model_cfg: dict[str, Any]
    preprocess: Preprocess
    weights: str
    """Where start weights come from (file, `hf-hub:...` or tag); empty: from scratch."""

    @property
    def text_cfg(self) -> dict[str, Any]:
        """The text tower's part, which also names the tokenizer."""
        cfg: dict[str, Any] = self.model_cfg["text_cfg"]
        return cfg

    @property
    def tokenizer_spec(self) -> TokenizerSpec:
        """The tokenizer as plain values, chosen as `open_clip.get_tokenizer` would."""
        cfg = self.text_cfg
        source = cfg.get("hf_tokenizer_name") or ""
        folder = self.name.removeprefix(LOCAL)
        if source and Path(folder).is_dir():
            source = folder  # an exported folder holds its tokenizer's files
        return TokenizerSpec(
            name=source,
            context_length=cfg.get("context_length", DEFAULT_CONTEXT_LENGTH),
            mode=cfg.get("tokenizer_mode") or "",
            options=tuple((cfg.get("tokenizer_kwargs") or {}).items()),
        )


def load_architecture(name: str, pretrained: str = "") -> Architecture:
    """Resolve a model name: open_clip's, a JSON file, a folder, `local-dir:...` or `hf-hub:...`.

    `hf-hub:` and `local-dir:` names bring their weights, as in open_clip, unless `pretrained` names
    others. Raises ConfigError with the nearest names, or with the way out when there is no network.
    """
    tree = _read_config(name)
    model_cfg = deepcopy(tree.get("model_cfg", tree))
    preprocess = model_cfg.pop("preprocess_cfg", None) or tree.get("preprocess_cfg")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_cfg]
    if missing:
        raise ConfigError(
            f"model.name = {name!r} is not an open_clip config: it lacks {', '.join(missing)}"
        )
    weights = pretrained or (name if name.startswith((HUB, LOCAL)) else "")
    if preprocess is None:
        preprocess = _published_preprocess(name, pretrained)
    tag = _tag_cfg(name, weights)
    if tag.get("quick_gelu"):
        model_cfg["quick_gelu"] = True  # these weights without it silently lose accuracy
    return Architecture(name, model_cfg, _to_preprocess(preprocess), weights)


def find_weights(architecture: Architecture) -> Path:
    """The checkpoint file behind `architecture.weights`, downloaded if need be.

    Raises ConfigError for a path or tag that does not exist, and when the hub cannot be reached.
    """
    weights, name = architecture.weights, architecture.name
    if weights.startswith(HUB):
        return _from_hub(weights.removeprefix(HUB), WEIGHTS_NAMES)
    path = Path(weights.removeprefix(LOCAL))
    if path.is_dir():
        return _weights_in(path)
    if path.is_file():
        return path
    tag = _tag_cfg(name, weights)
    if not tag:
        known = open_clip.list_pretrained_tags_by_model(name)
        near = ", ".join(difflib.get_close_matches(weights, known, 3, 0.0)) or "none"
        raise ConfigError(
            f"model.pretrained = {weights!r} is neither a file nor a tag of {name}; nearest: {near}"
        )
    repo, _, filename = tag["hf_hub"].rpartition("/")  # open_clip's form: "org/model/[file]"
    return _from_hub(repo, (filename,) if filename else WEIGHTS_NAMES)


def _read_config(name: str) -> dict[str, Any]:
    if name.startswith(HUB):
        return _read_json(_from_hub(name.removeprefix(HUB), (HF_CONFIG_NAME,)))
    path = Path(name.removeprefix(LOCAL))
    if name.startswith(LOCAL) or path.is_dir():
        return _read_json(path / HF_CONFIG_NAME)
    if path.suffix == ".json":
        return _read_json(path)
    builtin: dict[str, Any] | None = open_clip.get_model_config(name.replace("/", "-"))
    if builtin is None:
        raise ConfigError(
            f"model.name = {name!r} is no open_clip model; nearest: {', '.join(nearest(name))}"
        )
    return builtin


def nearest(name: str) -> list[str]:
    """The three open_clip names closest to `name`, letter case aside."""
    known = {known.casefold(): known for known in open_clip.list_models()}
    return [known[n] for n in difflib.get_close_matches(name.casefold(), known, 3, 0.0)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.glob("*.json")]
        near = ", ".join(difflib.get_close_matches(path.name, siblings, 3, 0.4)) or "none"
        raise ConfigError(
            f"model.name: {path.absolute()} does not exist; nearest there: {near}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: {path} is not readable as JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"model.name: {path} holds no JSON object")
    return tree


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"model.pretrained: {folder} holds no {HF_SAFE_WEIGHTS_NAME}")


def _from_hub(repo: str, names: tuple[str, ...]) -> Path:
    """The first of these files that the repository has, from the cache or the network."""
    reachable, reason = _hub_is_reachable(), ""
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, local_files_only=not reachable))
        except EntryNotFoundError as error:
            reason = str(error)
        except (OSError, ValueError) as error:
            reason = str(error)
            break
    reason = " ".join(reason.split())[:200] if reachable else "no network"
    raise ConfigError(f"model {HUB}{repo}: {OFFLINE.format(repo=repo)} ({reason})")


def _hub_is_reachable() -> bool:
    """Without a name server the hub's client would retry for most of a minute."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _tag_cfg(name: str, tag: str) -> dict[str, Any]:
    cfg: dict[str, Any] = open_clip.get_pretrained_cfg(name.replace("/", "-"), tag) if tag else {}
    return cfg


def _published_preprocess(name: str, pretrained: str) -> dict[str, Any]:
    """The tag's own, or the one that all of this model's published weights share, or {}."""
    if tag := _tag_cfg(name, pretrained):
        return tag
    tags = [
        _tag_cfg(name, tag)
        for tag in open_clip.list_pretrained_tags_by_model(name.replace("/", "-"))
    ]
    choices = [{key: tag[key] for key in _default_preprocess() if key in tag} for tag in tags]
    return choices[0] if choices and all(choice == choices[0] for choice in choices) else {}


def _default_preprocess() -> dict[str, Any]:
    cfg = asdict(open_clip.transform.PreprocessCfg())
    return {key: cfg[key] for key in ("mean", "std", "resize_mode")}


def _to_preprocess(found: dict[str, Any]) -> Preprocess:
    cfg = _default_preprocess()
    cfg.update({key: found[key] for key in cfg if found.get(key) is not None})
    red, green, blue = cfg["mean"]
    red_std, green_std, blue_std = cfg["std"]
    if cfg["resize_mode"] not in get_args(ResizeMode):
        known = ", ".join(get_args(ResizeMode))
        raise ConfigError(f"preprocess_cfg: resize_mode {cfg['resize_mode']!r} is none of {known}")
    return Preprocess((red, green, blue), (red_std, green_std, blue_std), cfg["resize_mode"])
