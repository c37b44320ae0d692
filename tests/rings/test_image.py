"""Images: the same functions as numba's, and none that may not be used."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rings import blkif, bounds, image, jit, ring
from rings.cache import DIGEST, PACKAGES
from rings.jit import compile_for, kernel, seam_function
from tests.rings import naive

pytestmark = [
    pytest.mark.jit_only("it is about compiled code"),
    pytest.mark.no_boundscheck("what checks bounds can raise, and is in no image"),
]

ROOT = Path(__file__).resolve().parents[2]
I64 = st.integers(-(2**63), 2**63 - 1)


@kernel
def raises(n: int) -> int:
    """What no kernel may do."""
    if n == 3:
        raise ValueError("three")
    return n


@seam_function
def minus(ctx: int, a: int, b: int, c: int) -> int:
    """A function that is called by its address."""
    return ctx - a - b - c


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An image of some functions of rings, in a cache directory of its own."""
    from rings import emit

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PVDRIVERS_CACHE_DIR", str(tmp_path_factory.mktemp("images") / "cache"))
        seam = {name: what for name, what in jit.asked.items() if name.endswith(".minus") and what[1] is None}
        patch.setattr(jit, "asked", seam)
        compile_for(bounds.in_range, 3)
        compile_for(blkif.put_response, 5)
        compile_for(blkif.to_native, 2)
        compile_for(ring.back_end, 4)
        compile_for(ring.format_page, 1)
        yield emit.write_image()


@pytest.fixture(scope="module")
def functions(made: Path) -> dict[str, Any]:
    return {name.rpartition(".")[2]: fn for name, fn in image.Image(made).functions.items()}


@given(I64, I64, st.integers(0, 2**63 - 1))
def test_a_result_that_is_a_bool(functions: dict[str, Any], start: int, count: int, limit: int) -> None:
    got = functions["in_range"](start, count, limit)
    assert got is naive.in_range(start, count, limit)
    assert got == bounds.in_range(start, count, limit)


@given(st.sampled_from([32, 64]), I64, st.integers(0, 255), st.integers(-(2**15), 2**15 - 1))
def test_nothing_returned_but_bytes_written(functions: dict[str, Any], abi: int, id: int, op: int, status: int) -> None:
    there, numbas = (ctypes.create_string_buffer(b"\xaa" * 24, 24) for _ in range(2))
    number = blkif.ABI_64 if abi == 64 else blkif.ABI_32
    assert functions["put_response"](ctypes.addressof(there), number, id, op, status) is None
    blkif.put_response(ctypes.addressof(numbas), number, id, op, status)
    assert there.raw == numbas.raw
    want = naive.response(abi, id % 2**64, op, status)
    assert there.raw[: len(want)] == want


@given(st.binary(min_size=112, max_size=112))
def test_a_request_of_the_other_abi(functions: dict[str, Any], data: bytes) -> None:
    source = ctypes.create_string_buffer(data, 112)
    out = ctypes.create_string_buffer(112)
    functions["to_native"](ctypes.addressof(out), ctypes.addressof(source))
    numbas = ctypes.create_string_buffer(112)
    blkif.to_native(ctypes.addressof(numbas), ctypes.addressof(source))
    assert out.raw == numbas.raw


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_attaching_to_a_ring(functions: dict[str, Any], req_prod: int, rsp_prod: int) -> None:
    page = np.zeros(4096, np.uint8)
    functions["format_page"](page.ctypes.data)
    struct.pack_into("<I", page, 0, req_prod)
    struct.pack_into("<I", page, 8, rsp_prod)
    ends = np.zeros(2, ring.RING_END)
    here, there = (ends.ctypes.data + n * ring.RING_END.itemsize for n in range(2))
    assert functions["back_end"](there, page.ctypes.data, 32, 112) == ring.back_end(here, page.ctypes.data, 32, 112)
    assert ends[0] == ends[1]


def test_a_seam_function(functions: dict[str, Any]) -> None:
    minus = functions["minus"]
    assert minus(1000, 100, 20, -3) == minus.ctypes(1000, 100, 20, -3) == 883
    assert jit.address_of(minus) > 0


def test_a_kernel_that_can_raise_is_in_no_image(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rings import emit

    monkeypatch.setattr(jit, "asked", {})
    compile_for(raises, 1)
    before = made.read_bytes()
    with pytest.raises(image.ImageError, match="an_exception"):
        emit.write_image()
    assert made.read_bytes() == before
    assert [p.name for p in made.parent.iterdir() if p.name.startswith("image")] == ["image"]


# What may not be used


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "image"))


def refused(path: Path) -> str:
    with pytest.raises(image.ImageError) as caught:
        image.Image(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_copy_may_be_used(copy: Path) -> None:
    assert image.Image(copy).functions


@pytest.mark.parametrize("at", [0, 20, 90, 300, 4096, -1])
def test_one_bit(copy: Path, at: int) -> None:
    data = bytearray(copy.read_bytes())
    data[at] ^= 4
    copy.write_bytes(data)
    assert "not an image" in refused(copy) if at == 0 else "damaged" in refused(copy)


@pytest.mark.parametrize("left", [0, 1, 60, 83, 2000, 4096, -1])
def test_cut_short(copy: Path, left: int) -> None:
    copy.write_bytes(copy.read_bytes()[:left])
    assert ("not an image" if 0 <= left < 18 else "damaged") in refused(copy)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_others_can_write_it(copy: Path, mode: int) -> None:
    copy.chmod(mode)
    assert f"owner {os.geteuid()}, mode {mode:04o}" in refused(copy)


@pytest.mark.root
def test_it_is_somebody_elses(copy: Path) -> None:
    os.chown(copy, 12345, 12345)
    assert "owner 12345" in refused(copy)


def test_not_a_file(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copy)
    assert "Too many levels" in refused(tmp_path / "link")
    assert "owner" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "nothing")


def test_made_for_another_processor(made: Path, tmp_path: Path) -> None:
    from rings.link import Linked

    path = tmp_path / "image"
    image.write(path, Linked(bytes(4096), {}, {}), {}, ["avx2048", "lm"])
    assert "made for a processor with avx2048, which this one has not" in refused(path)
    image.write(path, Linked(bytes(4096), {}, {}), {}, ["lm"])
    image.Image(path)


@pytest.mark.parametrize("name, value", [
    ("PVDRIVERS_IMAGE", "off"), ("NUMBA_DISABLE_JIT", "1"), ("NUMBA_BOUNDSCHECK", "1"), ("NUMBA_DEBUGINFO", "1"),
])  # fmt: skip
def test_settings_without_an_image(made: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert name in image.use()
    assert image.active is None


def test_too_late_for_this_process() -> None:
    assert "imported before" in image.use()
    assert image.active is None


# In a process of its own


def run(tree: Path, cache: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(tree), "PVDRIVERS_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_that_runs_from_it(made: Path) -> None:
    code = (
        "import sys; from rings import image; assert image.use() == ''\n"
        "from rings import bounds, ring\n"
        "from rings.jit import compile_for\n"
        "print(bounds.in_range(1, 2, 3), bounds.in_range(1, 3, 3))\n"
        "compile_for(bounds.in_range, 3)\n"
        "for call in (lambda: bounds.page_span(0, 1), lambda: compile_for(ring.front_end, 4)):\n"
        "    try: call()\n"
        "    except image.ImageError as e: print(e)\n"
        "print([name for name in sys.modules if 'numba' in name or 'llvm' in name])"
    )
    answers, absent, not_compiled, imported = run(ROOT, made.parents[1], code).splitlines()
    assert answers == "True False"
    assert absent.startswith("rings.bounds.page_span is not in the image")
    assert not_compiled.startswith("rings.ring.front_end is not in the image")
    assert imported == "[]"


def test_an_edit_of_a_source_leaves_the_image_behind(made: Path, tmp_path: Path) -> None:
    for package in filter(lambda name: (ROOT / name).is_dir(), PACKAGES):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    ask = "from rings import image; print(image.use())"
    cache = made.parents[1]
    assert (cache / DIGEST / "image").exists()
    assert run(tmp_path, cache, ask) == ""
    source = tmp_path / "blkback" / "request.py"
    before = source.stat()
    source.write_text(source.read_text() + "# edited\n")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "No such file" in run(tmp_path, cache, ask)
