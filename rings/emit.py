"""Making an image: what numba has compiled, as one object file, linked and written to the cache directory.

Each function gets an entry of C's: int64 arguments, an int64 result. A kernel raises nothing, and that is shown here:
an entry that could see an exception calls a function that does not exist, and is refused by the linker.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import llvmlite.binding as _llvm
from llvmlite import ir
from numba import types
from numba.core import config as _config
from numba.core.registry import cpu_target

from . import image, jit
from .link import LinkError, link

llvm: Any = _llvm
config: Any = _config

_I64 = ir.IntType(64)
_RAISED = "an_exception"
# Where LLVM and Linux name a feature differently, but for dots and underscores.
_LINUX_NAMES = {
    "bmi": "bmi1", "lzcnt": "abm", "pclmul": "pclmulqdq", "prfchw": "3dnowprefetch", "rdrnd": "rdrand",
    "sahf": "lahf_lm", "sha": "sha_ni", "sse3": "pni", "crc32": "sse4_2", "64bit": "lm", "x87": "fpu",
}  # fmt: skip


def write_image() -> Path:
    """Make an image of all that `compile_for` and `seam_function` have compiled in this process; where it is.

    Raises ImageError if there can be none here.
    """
    if reason := image.why_none():
        raise image.ImageError(reason)
    path = image.image_file()
    codegen = cpu_target.target_context.codegen()
    flags = _flags(codegen)
    entries = {name: _result_of(fn, kinds) for name, (fn, kinds) in jit.asked.items()}
    obj = _object(codegen, entries)
    kinds = {name: (len(result.fndesc.argtypes), _restype(result)) for name, result in entries.items()}
    try:
        image.write(path, link(obj, entries), kinds, flags)
    except LinkError as e:
        raise image.ImageError(str(e)) from e
    return path


def _flags(codegen: Any) -> list[str]:
    """What of this processor the code may use, in Linux's words."""
    if config.CPU_NAME not in (None, "generic"):
        raise image.ImageError(f"NUMBA_CPU_NAME={config.CPU_NAME}: an image is for this processor, or for generic")
    asked = re.findall(r"\+([^,]+)", codegen._tm_features or "")
    if not asked:
        return []
    names = {_bare(_LINUX_NAMES.get(name, name)) for name in asked}
    return sorted(flag for flag in image.processor_flags() if _bare(flag) in names)


def _bare(name: str) -> str:
    return re.sub(r"[._]", "", name)


def _result_of(fn: Any, kinds: Any) -> Any:
    """What numba keeps of one compiled function: of a kernel for these types of arguments, or of a cfunc."""
    if kinds is not None:
        return fn.overloads[kinds]
    found = fn._cache.load_overload(fn._sig, fn._targetdescr.target_context)
    if found is None:
        raise image.ImageError(f"{fn.__qualname__} is not in the cache directory any more; once more, please")
    return found


def _restype(result: Any) -> str:
    return str(types.unliteral(result.fndesc.restype))  # a function that returns 0 only has a type of its own


def _object(codegen: Any, entries: dict[str, Any]) -> bytes:
    module = llvm.parse_assembly(_entry_points(codegen, entries))
    for result in entries.values():
        module.link_in(result.library._get_module_for_linking(), preserve=True)
    # With nothing else to be called from outside, what is not needed goes, and calls need no table.
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration and symbol.name not in entries:
            symbol.linkage = "internal"
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=codegen._get_host_cpu_name(), features=codegen._tm_features or "", opt=3, reloc="pic", codemodel="small"
    )
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _entry_points(codegen: Any, entries: dict[str, Any]) -> str:
    """A module of functions that C could call, each around one of numba's."""
    context = cpu_target.target_context
    module = codegen.create_library("image").create_ir_module("image")
    raised = ir.Function(module, ir.FunctionType(ir.VoidType(), []), _RAISED)
    for name, result in entries.items():
        about = result.fndesc
        if {str(kind) for kind in about.argtypes} - {"int64", "bool"} or _restype(result) not in image.RESULTS:
            raise image.ImageError(f"{name}: {about.argtypes} -> {about.restype} is none of the types of an image")
        callee = ir.Function(
            module, context.call_conv.get_function_type(about.restype, about.argtypes), about.llvm_func_name
        )
        entry = ir.Function(module, ir.FunctionType(_I64, [_I64] * len(about.argtypes)), name)
        builder = ir.IRBuilder(entry.append_basic_block("entry"))
        wanted = [context.get_value_type(kind) for kind in about.argtypes]
        args = [arg if type_ == _I64 else builder.trunc(arg, type_) for arg, type_ in zip(entry.args, wanted)]
        status, value = context.call_conv.call_function(builder, callee, about.restype, about.argtypes, args)
        with builder.if_then(status.is_error, likely=False):
            builder.call(raised, [])
        if _restype(result) == "none":
            value = ir.Constant(_I64, 0)
        builder.ret(value if value.type == _I64 else builder.zext(value, _I64))
    return str(module)
