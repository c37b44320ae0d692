from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.hostile_frontend import Frontend, until
from tests.restart.bed import Bed


class Operator:
    """One daemon; `attach` does what xl does with whatever params an operator wrote."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.backend = bed.serve()
        self.top = bed.run_dir.parent
        self._read = 0

    def image(self, name: str, size: int = 1 << 20) -> Path:
        path = self.top / name
        path.write_bytes(bytes(size))
        return path

    @contextmanager
    def attached(self, params: str, **how: Any) -> Iterator[Frontend]:
        front = Frontend(self.bed.run_dir, self.bed.dom0, params, memory_mib=4, **how)
        try:
            yield front
        finally:
            front.destroy()
            assert self.backend.popen.poll() is None, self.bed.log.read_text()
            assert "our own fault" not in self.bed.log.read_text(), self.bed.log.read_text()

    def error(self, front: Frontend) -> str:
        """What libxl would show; the log says the same, once, and names the device."""
        until(lambda: front.key("hotplug-status") == "error", what="for hotplug-status")
        text = front.key("hotplug-error") or ""
        assert text in front.error()
        assert self.bed.log.read_text().count(f"vbd-{front.domid}-51712: {text}") == 1
        return text

    def refused(self, params: str, *words: str, **how: Any) -> None:
        with self.attached(params, **how) as front:
            text = self.error(front)
            for word in words:
                assert word in text, text
            assert front.backend() == 1, "nothing is offered"


@pytest.fixture(scope="session")
def operator() -> Iterator[Operator]:
    with TemporaryDirectory(dir="/dev/shm", prefix="pv-bad-") as top:
        with Bed(Path(top) / "run") as bed:
            yield Operator(bed)


@pytest.fixture
def small_fs(require_root: None, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of so many bytes."""
    with ExitStack() as stack:

        def make(size: int, name: str = "small") -> Path:
            where = tmp_path / name
            where.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", where], check=True)
            stack.callback(subprocess.run, ["umount", "-l", where], check=True)
            return where

        yield make


@pytest.fixture
def loop_device(require_root: None, tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Makes a block device of a file; ends the test where the kernel gives none."""
    with ExitStack() as stack:

        def make(path: Path) -> str:
            done = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no loop device: {done.stderr.strip()}")
            device = done.stdout.strip()
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=True)
            return device

        yield make
