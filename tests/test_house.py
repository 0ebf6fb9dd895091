"""The house itself: which way imports go, how long things are, whether the README is true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for room in ("data", "trainer", "launch") for path in (ROOT / room).rglob("*.py")
)
FORBIDDEN = {"data": {"trainer", "launch"}, "trainer": {"launch"}, "launch": set()}
LOSSES_MAY = {"torch", "trainer.collectives", "trainer.losses", "trainer.similarity"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    names = imports_of(path)
    assert not {name.split(".")[0] for name in names} & FORBIDDEN[room]
    if path.name != "engine.py":
        assert not any(name.split(".")[0] == "deepspeed" for name in names)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trainer" / "losses").glob("*.py")), ids=lambda path: path.name
)
def test_losses_know_only_torch_and_the_engine(path):
    ours = {name for name in imports_of(path) if name.split(".")[0] in FORBIDDEN}
    assert all(any(name.startswith(allowed) for allowed in LOSSES_MAY) for name in ours), ours


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_fit(path):
    text = path.read_text()
    assert text.count("\n") <= 420, "more than one subject?"
    assert text.isascii(), "ASCII in code and comments"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


def test_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\b(?:configs|tests|slurm|benchmarks|trainer|launch)/[\w./-]+", text))
    missing = [name for name in named if not (ROOT / name.rstrip("./")).exists()]
    assert not missing


def test_every_config_in_the_readme_or_with_a_comment():
    for path in (ROOT / "configs").glob("*.toml"):
        assert path.read_text().startswith("#"), f"{path.name} does not say what it shows"
