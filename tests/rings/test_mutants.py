"""Tests of the tests: each of these faults in rings/ is noticed by the tests that need no second processor.

What only shows between two processors (barriers, the order of event and look) is test_model.py's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "ring.py": ["test_ring.py", "test_ring_stateful.py"],
    "bounds.py": ["test_bounds.py"],
    "blkif.py": ["test_blkif.py"],
}
HELPERS = ["ends.py", "guard.py", "headers.py", "naive.py"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.jit_only("runs the tests with the JIT off by itself"),
    pytest.mark.no_boundscheck("runs the tests with the JIT off by itself"),
]

MUTANTS = {
    "overflow one too late": (
        "ring.py",
        'return n if n <= e["credit"] + signed',
        'return n if n <= 1 + e["credit"] + signed',
    ),
    "overflow one too early": (
        "ring.py",
        'return n if n <= e["credit"] + signed',
        'return n if n < e["credit"] + signed',
    ),
    "overflow by unsigned distance": (
        "ring.py",
        'return n if n <= e["credit"] + signed_distance(',
        'return n if n <= e["credit"] + distance(',
    ),
    "no overflow check": ("ring.py", 'return n if n <= e["credit"] + signed', "return n if True or signed"),
    "a front end with credit": ("ring.py", 'e["credit"] = 0', 'e["credit"] = nr_ents'),
    "room for one too many": ("ring.py", 'return e["nr_ents"] - e["credit"]', 'return 1 + e["nr_ents"] - e["credit"]'),
    "notify by signed distance": (
        "ring.py",
        'notify = distance(new, load_once32(e["prod_event"]))',
        'notify = signed_distance(new, load_once32(e["prod_event"]))',
    ),
    "notify one too often": ("ring.py", "])) < fresh", "])) <= fresh"),
    "our index read from the page": (
        "ring.py",
        'distance(new, e["pushed"])',
        'distance(new, load_once32(e["prod"]))',
    ),
    "take past the limit": ("ring.py", "    n = min(n, limit)\n", ""),
    "take copies too much": ("ring.py", "    if stride <= size:", "    if True:"),
    "cons not cut to 32 bits": ("ring.py", 'e["cons"] = (e["cons"] + n) & 0xFFFFFFFF', 'e["cons"] = e["cons"] + n'),
    "entries not rounded": ("ring.py", "return 1 << (fit.bit_length() - 1) if fit else 0", "return fit"),
    "format leaves the events": ("ring.py", "store_once32(sring + _REQ_EVENT, np.uint32(1))", "pass"),
    "back end attaches to req_prod": (
        "ring.py",
        'e["credit"] = nr_ents\n    e["prod_pvt"] = load_acquire32(sring + _RSP_PROD)',
        'e["credit"] = nr_ents\n    e["prod_pvt"] = load_acquire32(sring + _REQ_PROD)',
    ),
    "range by addition of 64 bits": (
        "bounds.py",
        "return start <= limit - count",
        "return (start + count) % 2**64 <= limit",
    ),
    "range without sign": ("bounds.py", "if start < 0 or count < 0 or count > limit", "if count > limit"),
    "padding of a request not cleared": ("blkif.py", "    store32(dst + 4, np.uint32(0))\n", ""),
    "padding of a response not cleared": (
        "blkif.py",
        "    store32(slot + 8, np.uint32((operation & 0xFF) | (status & 0xFFFF) << 16))",
        "    from .atomics import store8, store16\n    store8(slot + 8, operation)\n    store16(slot + 10, status)",
    ),
    "the default ABI is the native one": ("blkif.py", "return ABI_32 if (machine", "return ABI_64 if (machine"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_dies(name: str, tmp_path: Path) -> None:
    file, old, new = MUTANTS[name]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rings", tmp_path / "rings", ignore=ignore)
    here = tmp_path / "tests" / "rings"
    here.mkdir(parents=True)
    for test in TESTS[file] + HELPERS:
        shutil.copy(Path(__file__).with_name(test), here)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = (tmp_path / "rings" / file).read_text()
    assert source.count(old) == 1, "the source has changed, and this mutant with it"
    (tmp_path / "rings" / file).write_text(source.replace(old, new))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_DISABLE_JIT": "1"}
    environment.pop("CI", None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "tests/rings"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "Error" in done.stdout or "Segmentation" in done.stderr, done.stdout
    assert done.returncode != 0, f"survived: {name}\n{done.stdout}"
    assert "rror during collection" not in done.stdout, done.stdout
