"""Who may import whom, what may live in one file, and how long a file may be.

The rules are checked on the syntax tree, so nothing is imported, and an import inside a function or under
TYPE_CHECKING counts like any other. The second half of this file shows that each rule bites.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("blkback", "netback", "scsiback", "usbback")
PRODUCT = ("rings", "pvdrivers", *BACKENDS)
MOST_LINES = 400

# Parts of the pvdrivers package that are layers of their own; whatever is not named here is the core.
PARTS = {
    "pvdrivers.sim": "sim",
    "pvdrivers.xen": "xen",
    "pvdrivers.frontends": "frontends",
    "pvdrivers.cli": "shell",
    "pvdrivers.bench": "shell",
    "pvdrivers.__main__": "shell",
}
MAY_IMPORT = {
    "rings": set(),
    "core": {"rings"},
    "sim": {"rings", "core"},
    "xen": {"rings", "core"},
    "frontends": {"rings", "core"},
    # Backends are reached by the table of device classes only, which names them in strings.
    "shell": {"rings", "core", "sim", "xen", "frontends"},
    **{backend: {"rings", "core"} for backend in BACKENDS},
}
OUTSIDE = {"numpy", "numba", "cffi", "llvmlite", "pyroute2"}
SPEAKS_NETLINK = {"netback/links.py"}
SPEAKS_LLVM = {"rings/atomics.py", "rings/emit.py", "pvdrivers/syscalls.py"}
COMPILES = {"rings/jit.py"}
COMPILERS = {"jit", "njit", "cfunc", "vectorize", "guvectorize", "stencil"}
KERNEL_MAKERS = {"kernel", "inline", "seam_function"}
# The ring is a library for anybody's process: whether there are threads is not for it to say.
NOT_IN_RINGS = {"asyncio", "concurrent", "socket", "threading"}
TAKES_A_LOCK = {"rings/atomics.py"}  # its twins, with the JIT off, are atomic by a lock
OPERATING_SYSTEM = {
    "asyncio", "concurrent", "ctypes", "fcntl", "grp", "mmap", "multiprocessing", "os", "posix", "pty", "pwd",
    "resource", "select", "selectors", "shutil", "signal", "socket", "socketserver", "subprocess", "tempfile",
    "termios", "threading", "tty",
}  # fmt: skip
KERNELS_AND_SYSTEM = {
    "pvdrivers/syscalls.py": "the one file of libc calls",
    "rings/atomics.py": "with the JIT off its twins reach memory by ctypes",
}


@dataclass
class Facts:
    """What the rules need to know of one source file."""

    imported: list[tuple[int, str]] = field(default_factory=list)
    """Line and full name; ``from a import b`` is both a and a.b, as b may be a module."""
    kernels: list[int] = field(default_factory=list)

    def outermost(self) -> Iterator[tuple[int, str]]:
        """Line and top-level name of each import."""
        return ((line, name.partition(".")[0]) for line, name in self.imported)


def module_of(path: str) -> str:
    """``a/b/__init__.py`` -> a.b, ``a/b.py`` -> a.b"""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """The layer that a module belongs to; None when it is not of this project."""
    for part, layer in PARTS.items():
        if module == part or module.startswith(part + "."):
            return layer
    top = module.partition(".")[0]
    return {"pvdrivers": "core"}.get(top, top) if top in PRODUCT else None


def facts_of(path: str, source: str) -> Facts:
    """Read one source file."""
    facts = Facts()
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    makers: set[str] = set()
    jit_modules: set[str] = set()
    tree = ast.parse(source, path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                facts.imported.append((node.lineno, alias.name))
                if alias.name == "rings.jit":
                    jit_modules.add(alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            facts.imported.append((node.lineno, base))
            for alias in node.names:
                facts.imported.append((node.lineno, f"{base}.{alias.name}"))
                bound = alias.asname or alias.name
                if base == "rings.jit" and alias.name in KERNEL_MAKERS:
                    makers.add(bound)
                if f"{base}.{alias.name}" == "rings.jit":
                    jit_modules.add(bound)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                facts.imported.append((node.lineno, first.value))
    # A second walk, as a name may be used above the import that a first one has not yet seen.
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in makers:
            facts.kernels.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in KERNEL_MAKERS:
            if ast.unparse(node.value) in jit_modules:
                facts.kernels.append(node.lineno)
    return facts


def violations(path: str, source: str) -> list[str]:
    """Every rule that a product file at `path` breaks, as ``path:line: what``."""
    facts = facts_of(path, source)
    found = too_long(path, source)
    ours = layer_of(module_of(path))
    assert ours is not None, path
    for line, name in facts.imported:
        theirs = layer_of(name)
        if theirs is not None and theirs != ours and theirs not in MAY_IMPORT[ours]:
            found.append(f"{path}:{line}: {ours} must not import {theirs} ({name})")
        if name in {f"numba.{maker}" for maker in COMPILERS} and path not in COMPILES:
            found.append(
                f"{path}:{line}: {name} belongs in rings/jit.py; use kernel, inline or seam_function"
            )
    for line, top in facts.outermost():
        if top == "llvmlite" and path not in SPEAKS_LLVM:
            found.append(f"{path}:{line}: llvmlite belongs in {' and '.join(sorted(SPEAKS_LLVM))} only")
        elif top == "pyroute2" and path not in SPEAKS_NETLINK:
            found.append(f"{path}:{line}: pyroute2 belongs in {' and '.join(sorted(SPEAKS_NETLINK))} only")
        elif top not in OUTSIDE and top not in PRODUCT and top not in sys.stdlib_module_names:
            found.append(f"{path}:{line}: {top} is not among the packages that this project uses")
        if ours == "rings" and top in NOT_IN_RINGS and not (top == "threading" and path in TAKES_A_LOCK):
            found.append(f"{path}:{line}: rings must not import {top}")
    for attribute in ast.walk(ast.parse(source)):
        if isinstance(attribute, ast.Attribute) and attribute.attr in COMPILERS and path not in COMPILES:
            if ast.unparse(attribute.value) in ("numba", "nb"):
                found.append(f"{path}:{attribute.lineno}: numba.{attribute.attr} belongs in rings/jit.py")
    if facts.kernels and path not in KERNELS_AND_SYSTEM:
        for line, top in facts.outermost():
            if top in OPERATING_SYSTEM:
                kernels = f"kernels (line {min(facts.kernels)})"
                found.append(f"{path}:{line}: a file with {kernels} must not talk to the system ({top})")
    return list(dict.fromkeys(found))


def too_long(path: str, source: str) -> list[str]:
    """The one rule that tests have to keep as well."""
    lines = len(source.splitlines())
    return [f"{path}:{lines}: longer than {MOST_LINES} lines"] if lines > MOST_LINES else []


def sources(*tops: str) -> list[str]:
    """All Python files under these directories, as paths from the root."""
    return sorted(str(p.relative_to(ROOT)) for top in tops for p in (ROOT / top).rglob("*.py"))


# The project


@pytest.mark.parametrize("path", sources(*PRODUCT))
def test_product(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", sources("tests"))
def test_length_of_tests(path: str) -> None:
    assert too_long(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", [p for p in KERNELS_AND_SYSTEM if (ROOT / p).exists()])
def test_an_exception_is_still_needed(path: str) -> None:
    facts = facts_of(path, (ROOT / path).read_text())
    assert facts.kernels
    assert OPERATING_SYSTEM & {top for _, top in facts.outermost()}


def test_something_was_looked_at() -> None:
    assert {"rings/jit.py", "pvdrivers/cli/__init__.py"} <= set(sources(*PRODUCT))


# The checker


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("rings/a.py", "import pvdrivers.errors", "rings must not import core"),
        ("rings/a.py", "from pvdrivers import errors", "rings must not import core"),
        ("rings/a.py", "import threading", "rings must not import threading"),
        ("rings/a.py", "import scipy", "scipy is not among the packages"),
        ("rings/sub/a.py", "from ...pvdrivers import errors", "pvdrivers"),
        ("pvdrivers/a.py", "import pvdrivers.sim.grants", "core must not import sim"),
        ("pvdrivers/a.py", "from . import sim", "core must not import sim"),
        ("pvdrivers/a.py", "from .xen import evtchn", "core must not import xen"),
        ("pvdrivers/worker/a.py", "from ..frontends import blkfront", "core must not import frontends"),
        (
            "pvdrivers/worker/__init__.py",
            "from ..frontends import blkfront",
            "core must not import frontends",
        ),
        ("pvdrivers/a.py", "from pvdrivers.cli import main", "core must not import shell"),
        ("pvdrivers/a.py", "from blkback.request import plan", "core must not import blkback"),
        ("pvdrivers/a.py", "def f():\n    import blkback", "core must not import blkback"),
        (
            "pvdrivers/a.py",
            "import importlib\nimportlib.import_module('blkback')",
            "core must not import blkback",
        ),
        ("pvdrivers/sim/a.py", "from pvdrivers.xen import grants", "sim must not import xen"),
        ("pvdrivers/sim/a.py", "from ..xen import grants", "sim must not import xen"),
        ("pvdrivers/xen/a.py", "import pvdrivers.sim", "xen must not import sim"),
        ("blkback/a.py", "import netback", "blkback must not import netback"),
        ("blkback/a.py", "import pvdrivers.sim", "blkback must not import sim"),
        ("netback/a.py", "from pvdrivers import xen", "netback must not import xen"),
        ("scsiback/a.py", "import pvdrivers.frontends.scsifront", "scsiback must not import frontends"),
        ("usbback/a.py", "import pvdrivers.cli", "usbback must not import shell"),
        ("pvdrivers/frontends/a.py", "from blkback import request", "frontends must not import blkback"),
        ("pvdrivers/frontends/a.py", "from pvdrivers import sim", "frontends must not import sim"),
        ("pvdrivers/cli/a.py", "import blkback.backend", "shell must not import blkback"),
        ("pvdrivers/bench/a.py", "from usbback import request", "shell must not import usbback"),
        ("pvdrivers/a.py", "from llvmlite import ir", "llvmlite belongs in"),
        ("rings/a.py", "import llvmlite.binding", "llvmlite belongs in"),
        ("netback/tap.py", "import pyroute2", "pyroute2 belongs in"),
        ("rings/a.py", "from numba import njit", "numba.njit belongs in rings/jit.py"),
        ("blkback/a.py", "import numba\n@numba.njit(cache=True)\ndef f(): pass", "numba.njit belongs in"),
    ],
)
def test_an_import_against_the_rules_is_found(path: str, line: str, complaint: str) -> None:
    found = violations(path, f'"""A module."""\n{line}\n')
    assert len(found) >= 1
    assert all(f.startswith(f"{path}:") for f in found)
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "rings/a.py",
            "import os\nimport numpy as np\nfrom numba import types\nimport cffi\nfrom .jit import JIT",
        ),
        ("rings/atomics.py", "from llvmlite import ir\nimport threading"),
        ("pvdrivers/syscalls.py", "import llvmlite.binding"),
        ("rings/jit.py", "import numba\nf = numba.njit(lambda: 0)"),
        ("pvdrivers/a.py", "import rings.ring\nfrom .storage import uring\nfrom . import __version__"),
        ("pvdrivers/platform.py", "from importlib import import_module\nimport_module(f'pvdrivers.{kind}')"),
        (
            "pvdrivers/sim/a.py",
            "from . import grants\nfrom ..platform import GrantTable\nimport rings.atomics",
        ),
        ("pvdrivers/simple.py", "import pvdrivers.xenbus\nimport pvdrivers.xenstore"),
        (
            "blkback/a.py",
            "from .request import plan\nfrom pvdrivers.device import Device\nimport rings.blkif",
        ),
        ("pvdrivers/cli/a.py", "import pvdrivers.sim, pvdrivers.xen\nfrom ..frontends import blkfront"),
    ],
)
def test_what_the_rules_allow_is_let_through(path: str, line: str) -> None:
    assert violations(path, line) == []


KERNEL_FILES = (
    "from rings.jit import kernel\n@kernel\ndef f(): pass\n",
    "from rings.jit import inline as small\n@small\ndef f(): pass\n",
    "import rings.jit\n@rings.jit.kernel\ndef f(): pass\n",
    "from rings import jit\nf = jit.seam_function(g)\n",
    "def make():\n    return kernel(f)\nfrom rings.jit import kernel\n",
)


@pytest.mark.parametrize("kernels", KERNEL_FILES)
@pytest.mark.parametrize(
    "system", ["import os", "from socket import AF_UNIX", "import ctypes.util", "import mmap"]
)
def test_kernels_and_the_system_do_not_mix(kernels: str, system: str) -> None:
    for path in ("pvdrivers/a.py", "blkback/request.py", "pvdrivers/sim/grants.py"):
        found = violations(path, f"{system}\n{kernels}")
        assert len(found) == 1
        assert "must not talk to the system" in found[0]
        assert violations(path, kernels) == []
    for path in KERNELS_AND_SYSTEM:
        assert not [v for v in violations(path, f"{system}\n{kernels}") if "talk to the system" in v]


def test_a_kernel_in_its_own_package_is_seen() -> None:
    assert facts_of("rings/a.py", "from .jit import kernel\n@kernel\ndef f(): pass\n").kernels == [2]
    assert facts_of("rings/a.py", "from . import jit\n@jit.inline\ndef f(): pass\n").kernels == [2]


def test_the_system_without_kernels_is_no_matter() -> None:
    assert (
        violations("pvdrivers/a.py", "import os\nfrom rings.jit import cache_dir\nkernel = 1\nkernel\n") == []
    )


def test_length() -> None:
    assert violations("rings/a.py", "\n" * MOST_LINES) == []
    assert violations("rings/a.py", "\n" * (MOST_LINES + 1)) == ["rings/a.py:401: longer than 400 lines"]
    assert len(too_long("tests/a.py", "\n" * (MOST_LINES + 1))) == 1
