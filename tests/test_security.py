"""Nothing that comes from elsewhere runs: data, checkpoints, stores, configurations."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny_faces import face_config
from tiny_runs import _add, tiny_config, train_rank, write_shards

from data.cache import NodeCache
from data.index import load_index
from trainer.checkpoint import (
    MANIFEST,
    CheckpointError,
    check,
    find_checkpoint,
    load_checkpoint_config,
    load_weights,
    read_manifest,
)
from trainer.config import ConfigError, load_config
from trainer.export.formats import export_checkpoint
from trainer.export.onnx_file import OnnxOptions
from trainer.remote import DamagedError, Remote

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for room in ("data", "trainer", "launch") for path in (ROOT / room).rglob("*.py")
)
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "dill.load", "dill.loads",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "runpy.run_path", "importlib.import_module",
    "pd.read_pickle", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive",
}  # fmt: skip
ALLOWED = {
    "data/bins.py": {"pickle.Unpickler"},  # looks no name up: tests/test_bins.py
}


class Bomb:
    """What a pickle of this calls when it is loaded: a file appears."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_unpickles_runs_and_unpacks_nothing(path):
    """A call or base class of FORBIDDEN, torch.load or np.load that would unpickle, shell=True."""
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not {dotted(base) for base in node.bases} & (FORBIDDEN - allowed), node.lineno
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        options = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        assert name not in FORBIDDEN - allowed, f"line {node.lineno}: {name}"
        assert not options.get("shell") and not options.get("allow_pickle")
        assert not options.get("trust_remote_code")
        if name == "torch.load":
            assert options.get("weights_only") is True, f"line {node.lineno}"


# --- data ----------------------------------------------------------------------------------------


def write_bad_shard(folder: Path, marks: Path) -> str:
    """A shard of good samples with members beside them that other readers would run or extract."""
    write_shards(folder)
    path = folder / "x-0.tar"
    bomb = pickle.dumps(Bomb(marks / "pickle"))
    script = f"open({str(marks / 'python')!r}, 'w')\n".encode()
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
        for ending in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "ten"):
            _add(tar, f"0000.{ending}", bomb)
            _add(tar, f"bad{ending}.jpg", bomb)
            _add(tar, f"bad{ending}.txt", b"a picture")
            _add(tar, f"bad{ending}.cls", b"1")
        _add(tar, "0001.py", script)
        _add(tar, f"../{marks.name}/escaped.txt", b"out")
        _add(tar, f"{marks}/absolute.txt", b"out")
        link = tarfile.TarInfo("0002.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(marks / "linked")
        tar.addfile(link)
    return str(folder / "x-{0..2}.tar")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_members_of_a_shard_neither_run_nor_get_out(tmp_path, workers):
    marks = tmp_path / "marks"
    marks.mkdir()
    shards = write_bad_shard(tmp_path / "x", marks)
    config = tiny_config(
        tmp_path,
        data={"shards": shards, "workers": workers, "max_bad_fraction": 0.5},
        train={"duration": "3 steps"},
    )
    before = {path for path in tmp_path.rglob("*") if tmp_path / "run" not in path.parents}
    assert run_ranks(1, train_rank, config, str(tmp_path / "run")) == [True]
    assert not list(marks.iterdir())
    after = {path for path in tmp_path.rglob("*") if tmp_path / "run" not in path.parents}
    new = {path.name for path in after - before}
    assert all(name == "run" or name.endswith(".index.parquet") for name in new), new
    with (tmp_path / "0.pkl").open("wb") as file:
        pickle.dump(Bomb(marks / "control"), file)
    pickle.loads((tmp_path / "0.pkl").read_bytes())
    assert (marks / "control").exists(), "the bomb would have gone off"


def test_a_spool_is_named_by_us_not_by_the_shard(tmp_path):
    """`pipe:` and .gz sources are spooled: whatever they are called, in the cache folder."""
    cache = NodeCache(tmp_path / "cache", 10**6)
    for key in ("pipe:cat ../../evil", "/etc/passwd", "a/../../b", "x\0y"):
        fd, path = cache.spool(key, lambda fd: os.write(fd, b"z") and None)
        os.close(fd)
        assert Path(path).resolve().is_relative_to((tmp_path / "cache" / "spools").resolve())
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Runs at stages 0, 1 and 3, killed after three steps: each has the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("trained")
    for stage in (0, 1, 3):
        config = stage_config(folder, stage)
        with pytest.raises(AssertionError, match="exit codes"):
            run_ranks(1, train_rank, config, str(folder / f"stage-{stage}"), 3)
    return folder


def stage_config(folder: Path, stage: int):
    sections = {"train": {"duration": "4 steps"}, "checkpoint": {"every": "2 steps"}}
    return tiny_config(folder, zero={"stage": stage}, **sections)


def write_bomb(path: Path, mark: Path, tree: object = None) -> None:
    """torch.save's own zip, whose pickle calls a command; a `tree` is there as it was."""
    buffer = io.BytesIO()
    torch.save({"module": {}, "bomb": 0} if tree is None else tree, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = pickle.dumps({"module": Bomb(mark)}, protocol=2)
            new.writestr(name, content)


def sign(checkpoint: Path) -> None:
    """Whoever changes a checkpoint can make its manifest right again."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def arm(run: Path, mark: Path, pattern: str) -> Path:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    armed = sorted((checkpoint / "deepspeed").glob(pattern))
    assert armed
    for path in armed:
        write_bomb(path, mark)
    sign(checkpoint)
    assert check(checkpoint) == ""
    return checkpoint


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [(0, "*model*"), (1, "*model*"), (1, "*optim*"), (3, "*model*"), (3, "*optim*")],
)
def test_a_malicious_checkpoint_of_a_right_manifest_runs_nothing(trained, tmp_path, stage, pattern):
    """On resume, on resume at another world size (conversion), in eval and export."""
    mark = tmp_path / "ran"
    run = tmp_path / "run"
    shutil.copytree(trained / f"stage-{stage}", run)
    checkpoint = arm(run, mark, pattern)
    said = r"deepspeed: a file in it names (posix|nt|os)\.system, where tensors and plain values"
    config = stage_config(trained, stage)
    for ranks in (1, 2) if pattern == "*optim*" else (1,):
        with pytest.raises(AssertionError, match=said):
            run_ranks(ranks, train_rank, config, str(run))
    with pytest.raises(CheckpointError, match=said):
        load_weights(checkpoint)
    with pytest.raises(CheckpointError, match=said):
        export_checkpoint(run, tmp_path / "o", "safetensors", OnnxOptions(), ema=True)
    assert not mark.exists()
    torch.load(next((checkpoint / "deepspeed").glob(pattern)), weights_only=False)
    assert mark.exists(), "it would have gone off"


def test_what_we_write_is_read_as_tensors_alone(trained):
    """DeepSpeed's three classes of plain numbers are all that our files name."""
    from trainer.engine import STORED_CLASSES

    ours = {f"{kind.__module__}.{kind.__qualname__}" for kind in STORED_CLASSES}
    found: set[str] = set()
    for path in trained.rglob("*.pt"):
        found |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    assert found <= ours and found, found
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ, "the switch is on only while loading"
    for run in trained.glob("stage-*"):
        assert len(load_weights(find_checkpoint(run))) > 10


def test_other_kinds_of_files_hold_no_code(tmp_path):
    """Centers, averages, embeddings, names: safetensors, arrow and JSON."""
    config = face_config(tmp_path, train={"duration": "4 steps", "ema": 0.9})
    run_ranks(1, train_rank, config, str(tmp_path / "run"))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    endings = {
        p.suffix for p in checkpoint.rglob("*") if p.is_file() and p.parent.name != "deepspeed"
    }
    assert endings <= {".json", ".toml", ".safetensors", ".arrow"}


BAD_NAMES = ["../out", "/etc/out", "a/../../out", "..", "a\\..\\out", "", "x\0y"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    text = json.dumps({"format": 1, "files": {name: [3, hashlib.sha256(b"out").hexdigest()]}})
    with pytest.raises(ValueError, match="is no place inside the checkpoint"):
        read_manifest(text)
    step = tmp_path / "store" / "step-00000001"
    step.mkdir(parents=True)
    (step / MANIFEST).write_text(text)
    (tmp_path / "store" / "out").write_bytes(b"out")
    assert "is no place inside the checkpoint" in check(step)
    target = tmp_path / "run" / "checkpoints"
    with pytest.raises(DamagedError, match="no manifest"):
        Remote(f"file://{tmp_path}/store").fetch(1, target)
    assert not target.exists() or not list(target.rglob("out"))


def test_names_in_a_remote_store_are_steps_or_nothing(tmp_path):
    for name in ("step-1x", "step-", "latest", "step-../../x".replace("/", "_"), ".step-00000003"):
        (tmp_path / "store" / name).mkdir(parents=True)
    assert Remote(str(tmp_path / "store")).steps() == []


# --- configurations ------------------------------------------------------------------------------


def test_a_config_cannot_run_a_command(tmp_path):
    """A user may, on the command line."""
    mark = tmp_path / "ran"
    command = f"pipe:touch {mark}; cat x.tar"
    path = tmp_path / "run.toml"
    for text, key in (
        (f'[data]\nshards = "{command}"\n', "data.shards"),
        (f'[data]\nval_shards = ["a.tar", " {command}"]\n', "data.val_shards"),
        (f'[data]\nshards = "a.tar::{command}"\n', "data.shards"),
        (f'[[data.sources]]\nshards = "{command}"\n', "data.sources.shards"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as told:
            load_config(path)
        assert f"{path}: {key} = " in str(told.value) and "is a shell command" in str(told.value)
        assert f"give it on the command line, --{key}=" in str(told.value)
    path.write_text('[data]\nshards = "a.tar"\n')
    assert load_config(path, [f"--data.shards={command}"]).data.shards == command
    assert not mark.exists()


def test_the_config_of_a_checkpoint_from_elsewhere_runs_nothing(trained, tmp_path):
    shutil.copytree(trained / "stage-0", tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    toml, mark = checkpoint / "config.toml", tmp_path / "ran"
    lines = [
        f'val_shards = "pipe:touch {mark}"' if line.startswith("val_shards") else line
        for line in toml.read_text().splitlines()
    ]
    toml.write_text("\n".join(lines))
    sign(checkpoint)
    assert load_checkpoint_config(checkpoint).data.val_shards == ""
    asked = load_checkpoint_config(checkpoint, ["--data.val_shards=b.tar"])
    assert asked.data.val_shards == "b.tar" and not mark.exists()


def test_a_toml_file_is_values_only(tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nseed = \"__import__('os').getpid()\"\n")
    with pytest.raises(ConfigError, match=r"train\.seed"):
        load_config(tmp_path / "run.toml")


def test_index_of_a_bad_shard_is_plain_rows(tmp_path):
    (tmp_path / "marks").mkdir()
    shards = write_bad_shard(tmp_path / "x", tmp_path / "marks")
    before = set(sys.modules)
    index = load_index(shards)
    assert len(index) >= 60 and not list((tmp_path / "marks").iterdir())
    assert not {name for name in set(sys.modules) - before if "bad" in name}
