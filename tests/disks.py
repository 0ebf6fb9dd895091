"""Real disks that misbehave: small, read-only, slow, of another host. The small ones need root."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems: needs root")
CLONE_NEWNS = 0x00020000

SLOW_FSYNC = r"""
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* fsync of the files of one rank takes SLOW_S seconds, as on a disk that is slow or shared. */
int fsync(int fd) {
    static int (*real)(int);
    const char *rank = getenv("RANK"), *slow = getenv("SLOW_RANK"), *seconds = getenv("SLOW_S");
    char link[64], path[4096];
    ssize_t size;
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, sizeof path - 1);
    if (size > 0 && rank && slow && seconds && !strcmp(rank, slow)) {
        path[size] = 0;
        if (strstr(path, "optim_states")) sleep(atoi(seconds));
    }
    return real(fd);
}
"""


def mount(*arguments: str) -> None:
    """`mount ARGUMENTS`; a refusal is told."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    """`where` as a mount point until the end of the test."""
    where.mkdir(parents=True, exist_ok=True)
    mount(*arguments, str(where))
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@contextmanager
def small_disk(where: Path, mib: int) -> Iterator[Path]:
    """A file system of so many MiB."""
    with mounted(where, "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs") as disk:
        yield disk


def fill(disk: Path) -> Path:
    """Leave no free byte on a disk; the file that holds them all."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def hide(path: Path) -> None:
    """From now on this process alone sees an empty folder there."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "tmpfs", str(path))


def build_slow_fsync(folder: Path) -> Path:
    """A library for LD_PRELOAD under which one rank's disk is slow."""
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text("#define _GNU_SOURCE\n#include <stdio.h>\n" + SLOW_FSYNC)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library
