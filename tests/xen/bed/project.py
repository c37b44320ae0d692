"""The project's own image: the checkout's packages and tests, with all kernels compiled.

The compiler runs here, in a chroot of dom0's root at the path that it has in dom0, since under emulation a cold
compile takes minutes. Every file gets one and the same whole second as its time: numba compares times, and ext4
images made from a directory do not keep fractions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .steps import CHECKOUT, FILES, HERE, PROJECT, Made, digest, in_root, make_ext4, step

PACKAGES = ("rings", "pvdrivers", "blkback", "netback", "scsiback", "usbback")
BESIDE = ("tests", "examples", "pyproject.toml")
TIME = 1_700_000_000
COMPILED = ".compiled"
KEPT = 6


def _files(*tops: str) -> list[Path]:
    """What of the checkout is or could be committed, below some of its entries."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={CHECKOUT}", "ls-files", "-co", "--exclude-standard", "-z", "--", *tops],
        cwd=CHECKOUT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if listed.returncode == 0:
        found = [CHECKOUT / name for name in listed.stdout.split("\0") if name]
    else:
        found = [path for top in tops for path in [CHECKOUT / top, *(CHECKOUT / top).rglob("*")]]
    return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts and not p.is_relative_to(HERE))


def _copy(files: list[Path], tree: Path) -> None:
    for path in files:
        target = tree / path.relative_to(CHECKOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        os.utime(target, (TIME, TIME))


def _key(files: list[Path]) -> str:
    return digest(*(part for path in files for part in (str(path.relative_to(CHECKOUT)), path)))


def compiled(root: Made) -> Made:
    """The compile cache of the packages, as dom0 will look for it."""
    files = _files(*PACKAGES)

    def make(out: Path) -> None:
        _copy(files, out / "tree")
        (out / "tree" / COMPILED).mkdir(mode=0o700)
        shutil.copy(FILES / "environment", out / "tree/.environment")
        warm = f". {PROJECT}/.environment; cd {PROJECT}; python3 -m pvdrivers warm"
        in_root(root.path, warm, {out / "tree": PROJECT})
        (out / "tree" / COMPILED).rename(out / COMPILED)
        shutil.rmtree(out / "tree")

    inputs = [root.key, _key(files), FILES / "environment", Path(__file__)]
    return step("compiled", inputs, make, kept=KEPT)


def project_image(root: Made, code: Made) -> Made:
    """project.ext4, to be mounted at PROJECT."""
    files = _files(*PACKAGES, *BESIDE)

    def make(out: Path) -> None:
        tree = out / "tree"
        _copy(files, tree)
        shutil.copytree(code / COMPILED, tree / COMPILED)
        in_root(root.path, f"cd {PROJECT}; python3 -m compileall -q . || true", {tree: PROJECT})
        make_ext4(tree, out / "project.ext4", spare_mib=8)
        shutil.rmtree(tree)

    return step("project", [root.key, code.key, _key(files), Path(__file__)], make, kept=KEPT)
