"""Once `serve` is ready nothing that a guest does starts the compiler, nor loads code from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvdrivers.cli.children import Children
from pvdrivers.cli.guest import Guest
from pvdrivers.storage.uri import parse_disk

pytestmark = pytest.mark.jit_only("it is about the compiler")

# pvdrivers, with a line in a file for every version of every kernel that is compiled or loaded.
SPY = """
import sys
from numba.core.dispatcher import Dispatcher

compile, log = Dispatcher.compile, open(sys.argv.pop(1), "a", buffering=1)

def spy(self, sig):
    before = len(self.overloads)
    try:
        return compile(self, sig)
    finally:
        if len(self.overloads) > before:
            print(self.py_func.__module__, self.py_func.__qualname__, sig, file=log)

Dispatcher.compile = spy

from pvdrivers.cli import main

sys.exit(main())
"""


class Spied:
    """A `serve` that is spied on."""

    def __init__(self, run_dir: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-c", SPY, str(log), "serve", "--run-dir", str(run_dir)]
        environment = {**os.environ, "PVDRIVERS_IMAGE": "off"}  # from an image nothing can be compiled
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("ready"), self.process.communicate()[1]
        self.before = self.compiled()

    def compiled(self) -> list[str]:
        return self.log.read_text().splitlines()

    def since(self) -> list[str]:
        """What was compiled or loaded after it had said that it is ready."""
        return self.compiled()[len(self.before) :]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def serving(run_dir: Path, log: Path) -> Iterator[Spied]:
    spied = Spied(run_dir, log)
    try:
        yield spied
    finally:
        spied.process.terminate()
        try:
            spied.process.communicate(timeout=30)
        finally:
            spied.process.kill()


def new_image(directory: Path, name: str) -> Path:
    image = directory / name
    image.write_bytes(bytes(1 << 20))
    return image


def use_everything(guest: Guest, directory: Path) -> None:
    """Both ABIs, all policies, all kinds of requests, and an orderly end."""
    for abi in ("x86_64", "x86_32"):
        for policy in ("map", "persistent", "copy"):
            spec = parse_disk(f"{new_image(directory, f'{abi}-{policy}')},policy={policy},secure_discard=on")
            disk = guest.attach(spec, abi=abi, queues=2, indirect=32, ring_order=1)
            disk.write(0, b"x" * 299_008)
            assert disk.read(0, 299_008) == b"x" * 299_008
            disk.flush()
            if disk.info.barrier:
                disk.barrier(0, b"y" * 4096)
            disk.discard(8192, 8192)
            disk.discard(32768, 8192, secure=True)
            disk.close()


def test_nothing_compiles_after_ready(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    with Children(run_dir) as children:
        children.start("sim", "--memory", "256")
        with serving(run_dir, tmp_path / "log") as spied, Guest(run_dir, memory_mib=64) as guest:
            assert any("pvdrivers.worker.loop run" in line for line in spied.before), "the spy sees nothing"
            use_everything(guest, tmp_path)
            disk = guest.attach(parse_disk(str(new_image(tmp_path, "last"))), queues=1)
            disk.write(0, b"z" * 4096)
            assert spied.since() == []
            # A guest with requests in flight, and a process that goes on where another died.
            spied.kill()
            with serving(run_dir, tmp_path / "log") as again:
                deadline = time.monotonic() + 30
                assert disk.read(0, 4096) == b"z" * 4096
                assert time.monotonic() < deadline
                disk.close()
                assert again.since() == []


WARM_AGAIN = """
import numba.core.dispatcher as dispatcher

compile_core = dispatcher._FunctionCompiler._compile_core

def spy(self, args, return_type):
    print("compiled", self.py_func.__module__, self.py_func.__qualname__, args)
    return compile_core(self, args, return_type)

dispatcher._FunctionCompiler._compile_core = spy

import sys
from pvdrivers.cli import main

sys.exit(main(["warm"]))
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """What `warm` leaves in the cache is all that the next process asks for."""
    environment = {**os.environ, "PVDRIVERS_CACHE_DIR": str(tmp_path / "cache")}
    runs = [
        subprocess.run([sys.executable, "-c", WARM_AGAIN], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    first, second = (run.stdout.splitlines() for run in runs)
    assert any(line.startswith("compiled pvdrivers.worker.loop run") for line in first), "the spy sees nothing"
    assert [line for line in second if line.startswith("compiled")] == []
