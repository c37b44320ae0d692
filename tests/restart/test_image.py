"""`serve` from an image: no compiler in the process, the same service, the same survival; and what is done without."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pvdrivers.frontends.load import Load, Plan
from rings.cache import DIGEST, cache_dir
from rings.image import Image, ImageError

from .bed import Bed, until

pytestmark = pytest.mark.jit_only("it is about compiled code")

# serve; then what is loaded of the compiler, and what Python could call and is not in the image. A file with kernels
# has those that its own call.
LOADED = """
import sys
from pvdrivers.cli import main

path = sys.argv.pop(1)
status = main()
from rings.image import Absent

with open(path, "w") as out:
    for name, module in list(sys.modules.items()):
        there = vars(module)
        if name.partition(".")[0] in ("numba", "llvmlite"):
            print(name, file=out)
        elif not {"kernel", "inline", "seam_function"} & there.keys():
            for what in [what for what, value in there.items() if isinstance(value, Absent)]:
                print(name, what, file=out)
    print("looked at", len(sys.modules) > 100, file=out)
sys.exit(status)
"""


@pytest.fixture(scope="module", autouse=True)
def image() -> Path:
    """The image of this version, made if need be."""
    subprocess.run([sys.executable, "-m", "pvdrivers", "warm"], check=True, stdout=subprocess.DEVNULL)
    return cache_dir() / "image"


@pytest.fixture
def cache(image: Path, tmp_path: Path) -> Path:
    """A copy of the cache directory, to be spoilt."""
    shutil.copytree(image.parent, tmp_path / "cache" / DIGEST)
    for path in (tmp_path / "cache", tmp_path / "cache" / DIGEST):
        path.chmod(0o700)
    return tmp_path / "cache"


def test_an_image_is_made_once_at_a_time(cache: Path) -> None:
    """Daemons that die and start again before there is an image do not each leave a compiler running."""
    command = [sys.executable, "-m", "pvdrivers", "warm", "--unless-under-way"]
    environment = {**os.environ, "PVDRIVERS_CACHE_DIR": str(cache)}
    made = cache / DIGEST / "image"
    made.unlink()
    with open(cache / DIGEST / "warm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=20)
        assert (done.returncode, done.stdout) == (0, b"") and not made.exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert is_good(made)


def disk_image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8 << 20))
    return str(path)


def maps(bed: Bed) -> str:
    assert bed.backend is not None
    return Path(f"/proc/{bed.backend.popen.pid}/maps").read_text()


def is_good(path: Path) -> bool:
    """Whether there is an image that can be used."""
    try:
        return bool(Image(path).functions)
    except ImageError:
        return False


def from_image(bed: Bed) -> bool:
    """Whether the daemon runs from an image; and no compiler is there if so."""
    text = maps(bed)
    compilers = [name for name in ("llvmlite", "numba") if f"/{name}/" in text]
    rights = {line.split()[1] for line in text.splitlines() if not line.endswith("[vsyscall]")}
    assert compilers or not [r for r in rights if "w" in r and "x" in r], "code can be run, or be written, not both"
    return compilers == []


def test_served_from_an_image_and_killed(bed: Callable[..., Bed], tmp_path: Path) -> None:
    b = bed()
    b.serve()
    assert from_image(b)
    disk = b.disk(disk_image(tmp_path), queues=2, ring_order=1)
    before = b.frontend()
    load = Load(disk, Plan(depth=16, write_percent=50, verify="all", length=4 << 20))
    load.start()
    for environment in ({}, {"PVDRIVERS_IMAGE": "off"}, {}):  # the journal is the same for both kinds of code
        seen = load.snapshot().requests
        until(lambda seen=seen: load.snapshot().requests > seen + 200)  # type: ignore[misc]
        b.kill()
        b.serve(**environment)
        assert from_image(b) == (not environment)
    load.stop()
    result = load.wait(60)
    assert result.right and result.verified > 0 and result.requeues == 0
    assert b.frontend() == before
    assert "by numba, as no image can be used: PVDRIVERS_IMAGE=off" in b.log.read_text()


@pytest.mark.parametrize("words", [(), ("--io", "threads")])
def test_all_that_python_calls_is_in_it(bed: Callable[..., Bed], tmp_path: Path, words: tuple[str, ...]) -> None:
    b = bed(*words)
    loaded = tmp_path / "loaded"
    command = [sys.executable, "-c", LOADED, str(loaded), "serve", "--run-dir", str(b.run_dir), *words]
    with b.log.open("a") as log:
        serve = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert serve.stdout is not None
        assert serve.stdout.readline().startswith("ready")
        for policy in ("map", "persistent", "copy"):
            path = tmp_path / policy
            path.write_bytes(bytes(1 << 20))
            disk = b.disk(f"{path},policy={policy}", queues=2)
            disk.write(0, b"x" * 299_008)
            assert disk.read(0, 299_008) == b"x" * 299_008
            disk.flush()
            disk.close()
    finally:
        serve.terminate()
        serve.communicate(timeout=30)
    assert loaded.read_text() == "looked at True\n", "a compiler, or kernels that Python might call"


@pytest.mark.parametrize("spoil, why", [
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "damaged"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:50_000]), "damaged", marks=pytest.mark.slow),
    pytest.param(lambda path: path.chmod(0o666), "mode 0666", marks=pytest.mark.slow),
    pytest.param(lambda path: path.unlink(), "No such file", marks=pytest.mark.slow),
])  # fmt: skip
def test_without_it_the_compiler_serves_and_makes_the_next(
    bed: Callable[..., Bed], cache: Path, tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    path = cache / DIGEST / "image"
    spoil(path)
    b = bed()
    b.serve(PVDRIVERS_CACHE_DIR=str(cache))
    assert not from_image(b)
    said = [line for line in b.log.read_text().splitlines() if "no image can be used" in line]
    assert len(said) == 1 and why in said[0]
    disk = b.disk(disk_image(tmp_path))
    disk.write(0, b"y" * 8192)
    assert disk.read(0, 8192) == b"y" * 8192
    until(lambda: is_good(path), 120)
    b.kill()
    b.serve(PVDRIVERS_CACHE_DIR=str(cache))
    assert from_image(b)
    assert disk.read(0, 8192) == b"y" * 8192


@pytest.mark.root
def test_an_image_of_somebody_else(bed: Callable[..., Bed], cache: Path) -> None:
    os.chown(cache / DIGEST / "image", 12345, 12345)
    b = bed()
    b.serve(PVDRIVERS_CACHE_DIR=str(cache))
    assert not from_image(b)
    assert "owner 12345" in b.log.read_text()
