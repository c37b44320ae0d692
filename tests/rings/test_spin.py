"""docs/models/ring.pml in spin: nothing wrong with it, and something with each mutant."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.jit_only("spin runs no kernel, so this would be the same once more"),
    pytest.mark.no_boundscheck("spin runs no kernel, so this would be the same once more"),
]

MODEL = Path(__file__).resolve().parents[2] / "docs" / "models" / "ring.pml"


def verify(directory: Path, require_program: Callable[[str, str], str], *defines: str) -> tuple[int, int]:
    """Errors and states."""
    spin, gcc = require_program("spin", "spin"), require_program("gcc", "gcc")
    options = [f"-D{d}" for d in defines]
    subprocess.run([spin, *options, "-a", MODEL], cwd=directory, check=True, capture_output=True)
    subprocess.run([gcc, "-O2", "-w", "-DSAFETY", "-o", "pan", "pan.c"], cwd=directory, check=True)
    out = subprocess.run(["./pan", "-m100000"], cwd=directory, check=True, capture_output=True, text=True).stdout
    errors = re.search(r"errors: (\d+)", out)
    states = re.search(r"(\d+) states, stored", out)
    assert errors is not None and states is not None, out
    assert "max search depth too small" not in out
    return int(errors[1]), int(states[1])


@pytest.mark.parametrize("slots", [1, 2])
def test_model(slots: int, tmp_path: Path, require_program: Callable[[str, str], str]) -> None:
    errors, states = verify(tmp_path, require_program, f"R={slots}")
    assert errors == 0
    assert states > 1000


@pytest.mark.parametrize(
    "mutant", ["NO_BARRIER_IN_PUSH", "NO_BARRIER_IN_CHECK", "EVENT_TOO_EARLY", "ROOM_FOR_ONE_TOO_MANY"]
)
def test_mutant(mutant: str, tmp_path: Path, require_program: Callable[[str, str], str]) -> None:
    errors, _ = verify(tmp_path, require_program, "R=2", mutant)
    assert errors > 0
