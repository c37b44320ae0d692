"""Seam functions for Python: the control plane uses the very code that the worker uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rings.jit import JIT


def invoke(function: Any) -> Callable[..., int]:
    """The compiled function behind a seam function, as something that Python can call; the GIL is released."""
    if not JIT:
        return lambda ctx, a=0, b=0, c=0: int(function(ctx, a, b, c))
    compiled = function.ctypes
    return lambda ctx, a=0, b=0, c=0: int(compiled(ctx, a, b, c))
