"""What gcc makes of the headers of Debian's libxen-dev, to hold our dtypes and constants against."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PRELUDE = ("#include <stddef.h>", "#include <stdint.h>", "#include <stdio.h>", "#include <string.h>",
           "#define xen_mb()", "#define xen_rmb()", "#define xen_wmb()", "#include <xen/xen.h>")  # fmt: skip
INDICES = ("req_prod", "req_event", "rsp_prod", "rsp_event")


def layout_lines(structs: Mapping[str, np.dtype[Any]]) -> list[str]:
    """C that prints "struct field offset size" for all fields, and ". 0 size" for the whole."""
    lines = []
    for name, dtype in structs.items():
        lines.append(f'printf("{name} . 0 %zu\\n", sizeof(struct {name}));')
        for field in dtype.names or ():
            size = f"sizeof(((struct {name} *)0)->{field})"
            lines.append(f'printf("{name} {field} %zu %zu\\n", offsetof(struct {name}, {field}), {size});')
    return lines


def constant_lines(names: Sequence[str]) -> list[str]:
    """C that prints "constant name 0 value"."""
    return [f'printf("constant {name} 0 %d\\n", (int)({name}));' for name in names]


Seen = dict[tuple[str, str], tuple[int, int]]


def seen_by_c(lines: Sequence[str], tmp_path: Path, gcc: str) -> Seen:
    """What the program printed: (what, name) -> two numbers."""
    source, program = tmp_path / "offsets.c", tmp_path / "offsets"
    source.write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run([gcc, "-w", "-m64", "-o", program, source], check=True)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {(what, field): (int(at), int(size)) for what, field, at, size in map(str.split, out.splitlines())}


def compare_layouts(seen: Seen, structs: Mapping[str, np.dtype[Any]]) -> None:
    """Take the structs out of `seen`, each as its dtype has it."""
    for name, dtype in structs.items():
        assert seen.pop((name, ".")) == (0, dtype.itemsize), name
        for field, (format, at, *_) in (dtype.fields or {}).items():
            assert seen.pop((name, field)) == (at, format.itemsize), (name, field)


def compare_constants(seen: Seen, constants: Mapping[str, int]) -> None:
    """Take the constants out of `seen`, each with its value."""
    for name, value in constants.items():
        assert seen.pop(("constant", name))[1] == value, name


def toeplitz_by_c(cases: Sequence[tuple[bytes, bytes]], tmp_path: Path, gcc: str) -> list[int]:
    """The hashes of (key of up to 40 bytes, data of up to 36), by the reference code in netif.h."""
    source, program = tmp_path / "hash.c", tmp_path / "hash"
    source.write_text("""
        #include <stdint.h>
        #include <stdio.h>
        #include <string.h>
        #define xen_mb()
        #define xen_rmb()
        #define xen_wmb()
        #include <xen/xen.h>
        #define XEN_NETIF_DEFINE_TOEPLITZ
        #include <xen/io/netif.h>
        int main(void) {
            uint8_t key[40], data[36];
            unsigned sizes[2];
            while (fread(sizes, 4, 2, stdin) == 2 && fread(key, 1, 40, stdin) == 40 && fread(data, 1, 36, stdin) == 36)
                printf("%u\\n", xen_netif_toeplitz_hash(key, sizes[0], data, sizes[1]));
            return 0;
        }""")
    subprocess.run([gcc, "-w", "-o", program, source], check=True)
    text = b"".join(
        struct.pack("<II", len(key), len(data)) + key.ljust(40, b"\0") + data.ljust(36, b"\0") for key, data in cases
    )
    out = subprocess.run([program], input=text, stdout=subprocess.PIPE, check=True).stdout.split()
    assert len(out) == len(cases)
    return [int(value) for value in out]


Require = Callable[[str, str], str]
