"""An embedded Xen and a backend, each a process of its own; guests are added by the tests."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pvdrivers.cli.children import Children


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where an embedded Xen and a backend run."""
    path = tmp_path_factory.mktemp("e2e") / "run"
    path.mkdir(mode=0o700)
    with Children(path) as children:
        children.start("sim", "--memory", "2048")
        children.start("serve")
        yield path
        dead = children.dead()
        if dead:
            children.show(sys.stderr)
        assert not dead


Export = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture
def export(run_dir: Path, tmp_path: Path) -> Export:
    """``with export(disk, *options) as uri``: a guest process that exports its disk xvda by NBD."""

    @contextlib.contextmanager
    def run(disk: str, *options: str) -> Iterator[str]:
        socket = tmp_path / "nbd"
        command = [sys.executable, "-m", "pvdrivers", "guest", "--run-dir", str(run_dir), "--disk", disk]
        command += ["--nbd", f"unix:{socket}", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            lines = []
            while line := process.stdout.readline():
                lines.append(line)
                if line.startswith("nbd:"):
                    break
            else:
                raise AssertionError(f"the guest ended: {process.communicate()[1]}")
            assert lines[0].startswith("xvda: ")
            yield f"nbd+unix:///xvda?socket={socket}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert process.communicate()[1] == ""
            assert not socket.exists()
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 MiB of nothing."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


def eventually(reached: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it is reached within that time."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
