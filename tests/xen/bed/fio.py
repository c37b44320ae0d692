"""fio for the guests."""

from __future__ import annotations

import shutil
from pathlib import Path

from .debian import Apt
from .steps import Made, run, step


def fio(apt: Apt) -> Made:
    """A static fio: Debian's needs 80 MB of libraries."""

    def make(out: Path) -> None:
        apt("apt-get", "-q", "source", "--download-only", "fio", cwd=out)
        run("dpkg-source", "-x", "--no-check", *(p.name for p in out.glob("*.dsc")), "src", cwd=out)
        without = "rados rbd http gfapi libnfs pmem rdma numa xnvme".split()
        run("./configure", "--build-static", "--disable-native", *(f"--disable-{w}" for w in without), cwd=out / "src")
        run("make", "-s", "-j4", "fio", cwd=out / "src")
        run("strip", "-o", out / "fio", out / "src/fio")
        for path in out.iterdir():
            if path.name != "fio":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return step("fio", [apt.key, Path(__file__)], make)
