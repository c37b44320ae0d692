"""Xen's own programs, unmodified, on our store."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pvdrivers.bench.xenstore import PeerMissing, find_program, run, visit


def tool(name: str) -> str:
    """A program of xenstore-utils: the real one, not a wrapper that wants to run under Xen."""
    found = shutil.which(name)
    if found is not None and Path(found).resolve().parent.name != "bin":
        found = None
    if found is None or "xen-common" in str(Path(found).resolve()):
        try:
            return find_program(name)
        except PeerMissing:
            pytest.skip(f"{name} is not installed (Debian: xenstore-utils)")
    return found


class Shell:
    def __init__(self, path: Path) -> None:
        self.environ = {**os.environ, "XENSTORED_PATH": str(path)}

    def __call__(self, name: str, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            [tool(name), *words], env=self.environ, capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == status, done
        return done.stdout


@pytest.fixture
def shell(served: Any) -> Shell:
    return Shell(served.path)


def test_xens_own_test_program(served: Any) -> None:
    try:
        program = find_program("test-xenstore")
    except PeerMissing as e:
        pytest.skip(str(e))
    cases = visit(program, served.path, 20)
    assert len(cases) >= 12
    done = subprocess.run(
        [program, "-r", "1"],
        env={**os.environ, "XENSTORED_PATH": str(served.path)},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert served.call(lambda: served.server.nodes.check()) == []


def test_read_and_write(shell: Shell) -> None:
    shell("xenstore-write", "/a/b", "one", "/a/c", "two")
    assert shell("xenstore-read", "/a/b", "/a/c") == "one\ntwo\n"
    assert shell("xenstore-read", "-p", "/a/b") == "/a/b: one\n"
    shell("xenstore-read", "/a/none", status=1)
    shell("xenstore-exists", "/a/b")
    shell("xenstore-exists", "/a/none", status=1)
    assert shell("xenstore-list", "/a") == "b\nc\n"
    shell("xenstore-rm", "/a/b")
    assert shell("xenstore-list", "/a") == "c\n"


def test_listing_with_permissions(shell: Shell) -> None:
    shell("xenstore-write", "/top/in/deep", "value", "/top/other", "")
    shell("xenstore-chmod", "/top/in", "n0", "r5")
    assert shell("xenstore-ls", "/top") == 'in = ""\n deep = "value"\nother = ""\n'
    assert shell("xenstore-ls", "-f", "-p", "/top").splitlines() == [
        '/top/in = ""   (n0,r5)',
        '/top/in/deep = "value"   (n0)',
        '/top/other = ""   (n0)',
    ]
    shell("xenstore-chmod", "-r", "/top", "b0")
    assert "(b0)" in shell("xenstore-ls", "-p", "/top")


def test_a_directory_too_long_for_a_message(shell: Shell, served: Any) -> None:
    names = [f"child-{i:04d}" for i in range(1000)]
    served.call(lambda: [served.server.tree.mkdir(f"/long/{name}") for name in names])
    assert shell("xenstore-list", "/long").split() == names


def test_watch(served: Any) -> None:
    environ = {**os.environ, "XENSTORED_PATH": str(served.path)}
    watcher = subprocess.Popen(
        [tool("xenstore-watch"), "-n", "3", "/w"], env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        give_up = time.monotonic() + 10
        while not served.call(lambda: served.server.domains[0].watches) and time.monotonic() < give_up:
            time.sleep(0.01)
        with served.client() as store:
            store.write("/w/x", 1)
            store.write("/w/y", 1)
        output, _ = watcher.communicate(timeout=10)
    finally:
        watcher.kill()
        watcher.wait()
    assert output == "/w\n/w/x\n/w/y\n"


def test_control(shell: Shell) -> None:
    try:
        control = find_program("xenstore-control")
    except PeerMissing as e:
        pytest.skip(str(e))
    done = subprocess.run(
        [control, "quota"], env=shell.environ, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0 and "Nodes per domain" in done.stdout, done


@pytest.mark.slow
def test_beside_xenstored() -> None:
    """The comparison runs; what it measures decides no test."""
    rows = run(quick=True)
    if "missing" in rows[0]:
        pytest.skip(rows[0]["missing"])
    assert len(rows) == 24
    for row in rows:
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"], row
