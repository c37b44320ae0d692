"""The linker of images: what it lays out runs, and what it cannot do it refuses."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rings.link import PAGE, LinkError, link

llvm = pytest.importorskip("llvmlite.binding")


def compiled(source: str, **options: object) -> bytes:
    """An object file."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    settings: dict[str, object] = {"reloc": "pic", "codemodel": "small", **options}
    machine = llvm.Target.from_default_triple().create_target_machine(**settings)
    return bytes(machine.emit_object(llvm.parse_assembly(source)))


@contextmanager
def mapped(code: bytes) -> Iterator[int]:
    """The address of a copy of the code, with a page behind it."""
    memory = mmap.mmap(-1, len(code) + PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    start = ctypes.c_char.from_buffer(memory)
    yield ctypes.addressof(start)
    del start
    memory.close()


# A call of libc, a table of constants, a call of a function that cannot be inlined.
SOURCE = """
@primes = internal constant [6 x i64] [i64 2, i64 3, i64 5, i64 7, i64 11, i64 13]
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
define internal i64 @prime(i64 %n) noinline {
  %p = getelementptr [6 x i64], ptr @primes, i64 0, i64 %n
  %v = load i64, ptr %p
  ret i64 %v
}
define i64 @fill(ptr %at, i64 %n) {
  call void @llvm.memset.p0.i64(ptr %at, i8 7, i64 %n, i1 false)
  %v = call i64 @prime(i64 5)
  ret i64 %v
}
define i64 @third() {
  %v = call i64 @prime(i64 2)
  ret i64 %v
}
"""


def test_code_runs_wherever_it_lies() -> None:
    linked = link(compiled(SOURCE), ["fill", "third"])
    assert len(linked.code) % PAGE == 0
    assert set(linked.entries) == {"fill", "third"}
    assert list(linked.externals) == ["memset"]
    libc = ctypes.CDLL(None)
    room = (ctypes.c_uint8 * 300)()
    for _ in range(2):
        with mapped(linked.code) as base:
            for name, at in linked.externals.items():
                assert at >= len(linked.code), "what is filled in does not lie in the code's pages"
                address = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value
                ctypes.c_uint64.from_address(base + at).value = address or 0
            third = ctypes.CFUNCTYPE(ctypes.c_int64)(base + linked.entries["third"])
            fill = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(base + linked.entries["fill"])
            assert third() == 5
            assert fill(ctypes.addressof(room), 299) == 13
            assert bytes(room) == b"\7" * 299 + b"\0"
            room[:] = [0] * 300


@pytest.mark.parametrize("source, entry, complaint", [
    ("declare i64 @getenv(i64)\ndefine i64 @f(i64 %n) {\n %v = call i64 @getenv(i64 %n)\n ret i64 %v\n}", "f",
     "calls getenv"),
    ("@word = global i64 3\ndefine void @f() {\n store i64 1, ptr @word\n ret void\n}", "f", "can be written"),
    ("@word = global i64 0\ndefine void @f() {\n store i64 1, ptr @word\n ret void\n}", "f", "can be written"),
    ("define void @f() {\n ret void\n}", "g", "not in the object: g"),
])  # fmt: skip
def test_what_is_refused(source: str, entry: str, complaint: str) -> None:
    with pytest.raises(LinkError, match=complaint):
        link(compiled(source), [entry])


def test_absolute_addresses_are_refused() -> None:
    with pytest.raises(LinkError, match="only relative ones"):
        link(compiled(SOURCE, reloc="static", codemodel="large"), ["fill"])


@given(st.binary(max_size=100))
def test_what_is_no_object(data: bytes) -> None:
    with pytest.raises(LinkError, match="not an object|not a relocatable"):
        link(data, [])
