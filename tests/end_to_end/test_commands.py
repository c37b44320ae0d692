"""``pvdrivers demo`` and ``pvdrivers guest`` as commands: what they print, how they end, what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pvdrivers.cli.table import Table

DEMO = [sys.executable, "-m", "pvdrivers", "demo", "--size", "16", "--seconds", "2"]


def _environment(tmp_path: Path) -> dict[str, str]:
    """With temporary files where the test sees them."""
    return {**os.environ, "TMPDIR": str(tmp_path)}


def _processes(word: str) -> list[int]:
    """Processes with `word` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_demo(tmp_path: Path) -> None:
    done = subprocess.run(DEMO, env=_environment(tmp_path), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("every byte was right")
    assert "16 MiB compared" in lines[-2]
    assert "2 queues, rings of 4 pages" in lines[1]
    (guests,) = (line for line in lines if line.startswith("two guests: 00:16:3e:"))
    (passed,) = (line for line in lines if line.startswith("the guests have sent each other "))
    assert "by the built-in switch" in guests and passed.endswith(" MB/s: every byte compared")
    assert "\x1b" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert _processes(str(tmp_path)) == []


@pytest.mark.slow
def test_demo_over_a_killed_backend(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--kill"], env=_environment(tmp_path), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is killed, and started again" in done.stdout
    assert "MB/s: every byte compared" in done.stdout, "the network goes on, too"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_is_interrupted(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [*DEMO[:-1], "60"], env=_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("write every block"):
            break
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert _processes(str(tmp_path)) == []


@pytest.mark.slow
def test_demo_keeps_what_is_on_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "mine.img"
    image.write_bytes(bytes(8 << 20) + b"precious" * 64 + bytes(1 << 20))
    before = image.read_bytes()
    done = subprocess.run([*DEMO, "--disk", str(image)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert image.read_bytes() == before
    command = [*DEMO[:4], "--seconds", "1", "--disk", str(image), "--overwrite"]
    done = subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.stat().st_size == len(before)
    assert b"precious" not in image.read_bytes()


def test_a_guest_without_an_embedded_xen(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pvdrivers", "guest", "--run-dir", str(tmp_path), "--disk", "null:"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pvdrivers sim --run-dir" in done.stderr


def test_a_guest_leaves_nothing_behind(run_dir: Path) -> None:
    from pvdrivers import sim
    from pvdrivers.sim import toolstack

    command = [sys.executable, "-m", "pvdrivers", "guest", "--run-dir", str(run_dir), "--disk", "memory:1M"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("xvda: 1 MiB")
    dom0 = sim.open(run_dir)
    assert len(toolstack.list_domains(dom0.hypercalls)) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.stdout.close()
    assert [domain.domid for domain in toolstack.list_domains(dom0.hypercalls)] == [0]
    assert not dom0.store.ls("/local/domain/0/backend/vbd")
    assert dom0.store.ls("/local/domain") == ["0"]
    dom0.close()


class _Screen:
    """A terminal of a certain width."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("columns", [1, 20, 40, 80, 200])
def test_the_table_fits(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = _Screen()
    table = Table(screen)  # type: ignore[arg-type]
    table._row(["phase"] + ["1,234"] * 9, end=True)
    rows = screen.text.replace("\r", "").replace("\x1b[K", "").splitlines()
    assert all(len(row) < max(2, columns) for row in rows)
    assert "\x1b[1m" not in screen.text
