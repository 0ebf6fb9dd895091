"""Runs the README's checked block of commands in a folder of its own, so that it cannot rot."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- checked: .*? -->\n```\n(.*?)```", re.S)


def main() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    if not blocks:
        sys.exit("README.md has no checked block")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("configs", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            print(f"$ {line}", flush=True)
            subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
