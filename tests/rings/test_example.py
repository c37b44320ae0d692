"""The example of the README runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "ring_two_processes.py", "5000"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = re.fullmatch(r"5000 squares; woke the other side (\d+) times, saved it (\d+) times\n", done.stdout)
    assert figures is not None, done.stdout
    assert 1 <= int(figures[1]) <= 5000


def test_rings_needs_nothing_else_of_this_project() -> None:
    code = (
        "import sys, rings.ring, rings.blkif, rings.bounds\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('pvdrivers', 'blkback')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
