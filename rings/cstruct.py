"""C declarations to numpy dtypes: a wire format is written down once, in the language of its header.

cffi lays the structs out as the C compiler would; nothing is compiled, and no C library is loaded.
"""

from __future__ import annotations

from typing import Any

import cffi
import numpy as np

__all__ = ["dtypes"]


def _format(ctype: Any) -> Any:
    """The numpy format of one C type."""
    if ctype.kind == "primitive":
        size = _FFI.sizeof(ctype)
        signed = int(_FFI.cast(ctype, -1)) < 0
        return np.dtype(f"{'i' if signed else 'u'}{size}")
    if ctype.kind == "array":
        return np.dtype((_format(ctype.item), (ctype.length,)))
    if ctype.kind in ("struct", "union"):
        fields = ctype.fields
        return np.dtype(
            {
                "names": [name for name, _ in fields],
                "formats": [_format(field.type) for _, field in fields],
                "offsets": [field.offset for _, field in fields],
                "itemsize": _FFI.sizeof(ctype),
            }
        )
    raise TypeError(f"{ctype.cname}: a wire format has integers, arrays and structs only")


_FFI = cffi.FFI()


def dtypes(declarations: str, *names: str, pack: int | None = None) -> tuple[np.dtype[Any], ...]:
    """The dtypes of the structs called `names`. `pack` is the largest alignment, 4 for the i386 ABI.

    Raises cffi.CDefError for a declaration that is no C, TypeError for a type that cannot be on a wire.
    """
    ffi = cffi.FFI()
    ffi.cdef(declarations, pack=pack)
    return tuple(_format(ffi.typeof(f"struct {name}")) for name in names)
