"""Memory ordering, made visible. The only file (with pvdrivers/syscalls.py) that builds LLVM's code.

Every word that two parties share is read and written through this file; a plain array load may be hoisted out
of a loop by the compiler, and then a wait never ends. Names say the ordering, not the instruction. Addresses
are int64. On x86-64 an acquire load and a release store are plain moves; on arm64 they are ldar and stlr.

    ring.h                      here
    xen_wmb(); prod = x         store_release32(prod, x)
    x = prod; xen_rmb()         load_acquire32(prod)
    xen_mb()                    full_barrier()

Under NUMBA_DISABLE_JIT=1 each intrinsic is replaced by a ctypes twin (below): same names, same results. Loads
and stores of the twins are single accesses; their compare_exchange and fetch_* are two, so not for a second
thread. The twins are also there in a process that runs from an image, where no kernel is left to call them.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .jit import NUMBA, inline

if NUMBA:
    import llvmlite.binding as _llvm
    import numba
    import numba.core.cgutils as _cgutils
    import numba.extending as _extending
    from llvmlite import ir

    # What numba says of the types of these is about their insides.
    carray: Any = vars(numba)["carray"]
    types: Any = numba.types
    cgutils: Any = _cgutils
    intrinsic: Any = _extending.intrinsic

    _llvm.initialize_native_asmparser()  # inline assembly aborts the process without it

    _I8, _I32, _I64 = (ir.IntType(n) for n in (8, 32, 64))
    _NUMBA = {8: types.uint8, 16: types.uint16, 32: types.uint32, 64: types.int64}

    def _ptr(builder: Any, addr: Any, ity: Any) -> Any:
        return builder.inttoptr(addr, ity.as_pointer())

    def _load(bits: int, ordering: str | None) -> Any:
        ity, nty = ir.IntType(bits), _NUMBA[bits]

        @intrinsic
        def load(typingctx: Any, addr: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                p = _ptr(builder, args[0], ity)
                if ordering is None:
                    return builder.load(p)
                return builder.load_atomic(p, ordering, bits // 8)

            return nty(types.int64), codegen

        return load

    def _store(bits: int, ordering: str | None) -> Any:
        ity, nty = ir.IntType(bits), _NUMBA[bits]

        @intrinsic
        def store(typingctx: Any, addr: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                p = _ptr(builder, args[0], ity)
                if ordering is None:
                    builder.store(args[1], p)
                else:
                    builder.store_atomic(args[1], p, ordering, bits // 8)
                return context.get_dummy_value()

            return types.none(types.int64, nty), codegen

        return store

    def _cas(bits: int) -> Any:
        ity, nty = ir.IntType(bits), _NUMBA[bits]

        @intrinsic
        def cas(typingctx: Any, addr: Any, old: Any, new: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                p = _ptr(builder, args[0], ity)
                return builder.extract_value(builder.cmpxchg(p, args[1], args[2], "seq_cst", "monotonic"), 0)

            return nty(types.int64, nty, nty), codegen

        return cas

    def _rmw(op: str, bits: int) -> Any:
        ity, nty = ir.IntType(bits), _NUMBA[bits]

        @intrinsic
        def rmw(typingctx: Any, addr: Any, value: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                return builder.atomic_rmw(op, _ptr(builder, args[0], ity), args[1], "seq_cst")

            return nty(types.int64, nty), codegen

        return rmw

    @intrinsic
    def full_barrier(typingctx: Any) -> Any:
        """xen_mb(): everything before is seen by the other side before anything after is done."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.none(), codegen

    @intrinsic
    def compiler_barrier(typingctx: Any) -> Any:
        """Nothing is kept in registers across this, and no load from shared memory is done again after it."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)
            return context.get_dummy_value()

        return types.none(), codegen

    @intrinsic
    def pause(typingctx: Any) -> Any:
        """Tell the core that we spin (pause on x86, yield on arm64)."""
        hint = "pause" if "x86" in _llvm.get_process_triple() else "yield"

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.asm(ir.FunctionType(ir.VoidType(), []), hint, "", [], True)
            return context.get_dummy_value()

        return types.none(), codegen

    def _prefetch(write: int) -> Any:
        @intrinsic
        def prefetch(typingctx: Any, addr: Any) -> Any:
            def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                p = _ptr(builder, args[0], _I8)
                kind = ir.FunctionType(ir.VoidType(), [p.type, _I32, _I32, _I32])
                fn = builder.module.declare_intrinsic("llvm.prefetch", (p.type,), kind)
                builder.call(fn, [p, _I32(write), _I32(3), _I32(1)])
                return context.get_dummy_value()

            return types.none(types.int64), codegen

        return prefetch

    @intrinsic
    def cycles(typingctx: Any) -> Any:
        """The processor's cycle counter (rdtsc)."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            fn = builder.module.declare_intrinsic("llvm.readcyclecounter", fnty=ir.FunctionType(_I64, []))
            return builder.call(fn, [])

        return types.int64(), codegen

    @intrinsic
    def _memcpy(typingctx: Any, dst: Any, src: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            cgutils.raw_memcpy(builder, _ptr(builder, args[0], _I8), _ptr(builder, args[1], _I8), args[2], 1)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def _memset(typingctx: Any, dst: Any, n: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            cgutils.memset(builder, _ptr(builder, args[0], _I8), args[1], 0)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64), codegen

    @intrinsic
    def call(typingctx: Any, address: Any, ctx: Any, a: Any, b: Any, c: Any) -> Any:
        """Call the seam function at `address`: int64 f(ctx, a, b, c)."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            fn = builder.inttoptr(args[0], ir.FunctionType(_I64, [_I64] * 4).as_pointer())
            return builder.call(fn, args[1:])

        return types.int64(*[types.int64] * 5), codegen

    @intrinsic
    def _as_pointer(typingctx: Any, addr: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], cgutils.voidptr_t)

        return types.voidptr(types.int64), codegen

    @inline
    def records(addr: int, n: int, dtype: Any) -> Any:
        """`n` records of `dtype` at an address. For one take ``records(addr, 1, DT)[0]``, and r["field"]."""
        return carray(_as_pointer(addr), (n,), dtype)

else:
    import ctypes
    from collections.abc import Callable

    _C = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_int64}

    def _wrap(value: int, bits: int) -> int:
        value = int(value) & ((1 << bits) - 1)
        return value - (1 << 64) if bits == 64 and value >> 63 else value

    def _load(bits: int, ordering: str | None) -> Any:
        cty = _C[bits]
        return lambda addr: cty.from_address(int(addr)).value

    def _store(bits: int, ordering: str | None) -> Any:
        cty = _C[bits]

        def store(addr: int, value: int) -> None:
            cty.from_address(int(addr)).value = _wrap(value, bits)

        return store

    def _cas(bits: int) -> Any:
        cty = _C[bits]

        def cas(addr: int, old: int, new: int) -> int:
            word = cty.from_address(int(addr))
            seen: int = word.value
            if seen == _wrap(old, bits):
                word.value = _wrap(new, bits)
            return seen

        return cas

    def _rmw(op: str, bits: int) -> Any:
        cty = _C[bits]
        combine: Callable[[int, int], int] = {
            "xchg": lambda a, b: b,
            "add": lambda a, b: a + b,
            "and": lambda a, b: a & b,
            "or": lambda a, b: a | b,
        }[op]

        def rmw(addr: int, value: int) -> int:
            word = cty.from_address(int(addr))
            seen: int = word.value
            word.value = _wrap(combine(seen, int(value)), bits)
            return seen

        return rmw

    def _prefetch(write: int) -> Any:
        return lambda addr: None

    def full_barrier() -> None:
        """The plain twin: one interpreter has one order."""

    def compiler_barrier() -> None:
        """The plain twin."""

    def pause() -> None:
        """The plain twin: let another thread run."""
        time.sleep(0)

    def cycles() -> int:
        """The plain twin: nanoseconds."""
        return time.perf_counter_ns()

    def _memcpy(dst: int, src: int, n: int) -> None:
        ctypes.memmove(int(dst), int(src), int(n))

    def _memset(dst: int, n: int) -> None:
        ctypes.memset(int(dst), 0, int(n))

    def call(address: int, ctx: int, a: int, b: int, c: int) -> int:
        """The plain twin: look the Python function up."""
        from .jit import _PlainSeam

        return _PlainSeam.table[int(address)](ctx, a, b, c)

    def records(addr: int, n: int, dtype: Any) -> Any:
        """The plain twin: a numpy array over the same bytes."""
        size = int(n) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(int(addr)), dtype)


load8, load16, load32, load64 = (_load(b, None) for b in (8, 16, 32, 64))
"""Plain loads and stores, for memory that only we write."""
store8, store16, store32, store64 = (_store(b, None) for b in (8, 16, 32, 64))
load_once16, load_once32, load_once64 = (_load(b, "monotonic") for b in (16, 32, 64))
"""READ_ONCE and WRITE_ONCE: exactly one access, in no order."""
store_once16, store_once32, store_once64 = (_store(b, "monotonic") for b in (16, 32, 64))
load_acquire16, load_acquire32, load_acquire64 = (_load(b, "acquire") for b in (16, 32, 64))
store_release16, store_release32, store_release64 = (_store(b, "release") for b in (16, 32, 64))
compare_exchange16, compare_exchange32, compare_exchange64 = (_cas(b) for b in (16, 32, 64))
"""(address, expected, new) -> the value seen; it was stored if that is the expected one. A full barrier."""
exchange32, exchange64 = _rmw("xchg", 32), _rmw("xchg", 64)
fetch_add32, fetch_add64 = _rmw("add", 32), _rmw("add", 64)
fetch_or32, fetch_or64 = _rmw("or", 32), _rmw("or", 64)
fetch_and16, fetch_and32, fetch_and64 = _rmw("and", 16), _rmw("and", 32), _rmw("and", 64)

prefetch, prefetch_to_write = _prefetch(0), _prefetch(1)
"""Have the line at an address brought here meanwhile: a hint, which never faults. What another core has written is some
hundred instructions away, and nothing behind a locked one is fetched before that is done."""


i64: Any = np.int64
"""A number from a record's field as the int64 that kernels count in; unsigned fields would turn sums unsigned."""


@inline
def copy_bytes(dst: int, src: int, n: int) -> None:
    """memcpy. Slice assignment in a kernel is five to thirty times slower."""
    _memcpy(dst, src, n)


@inline
def zero_bytes(dst: int, n: int) -> None:
    """memset(dst, 0, n)."""
    _memset(dst, n)


@inline
def copy_in(dst: int, src: int, n: int) -> None:
    """Copy from memory that a peer can change meanwhile; afterwards only the copy is looked at (XSA-155).

    The barrier keeps the compiler from going back to the shared page for a value that it already has here.
    """
    _memcpy(dst, src, n)
    compiler_barrier()


@inline
def distance(a: int, b: int) -> int:
    """a - b for free-running 32-bit indices, as a number from 0 to 2**32 - 1."""
    return (a - b) & 0xFFFFFFFF


@inline
def signed_distance(a: int, b: int) -> int:
    """a - b for free-running 32-bit indices, as a number from -2**31 to 2**31 - 1."""
    d = (a - b) & 0xFFFFFFFF
    return d - ((d & 0x80000000) << 1)
