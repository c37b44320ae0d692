"""What the verbs of the command line have in common: the options that several have, and how values are read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TypeAlias

# In quotes: at run time there is no such name to subscript.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def default_run_dir() -> Path | None:
    """Where sockets and journals are when ``--run-dir`` is not given; None where no place is safe."""
    if named := os.environ.get("PVDRIVERS_RUN_DIR"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/run/pvdrivers")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "pvdrivers" if runtime else None


def new_verb(verbs: Verbs, name: str, purpose: str) -> argparse.ArgumentParser:
    """A verb; `purpose` is its line in the help."""
    # Abbreviations would let a new option change what an old script means.
    return verbs.add_parser(
        name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".", allow_abbrev=False
    )


def run_dir_option(verb: argparse.ArgumentParser) -> None:
    """--run-dir, where everything is that survives a daemon."""
    default = default_run_dir()
    shown = "" if default is None else f" (default: {default})".replace("%", "%%")
    verb.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        default=default,
        required=default is None,
        help=f"directory of the sockets, stats and journals{shown}",
    )


def domain_argument(verb: argparse.ArgumentParser) -> None:
    """DOMAIN, for the verbs that are about one guest."""
    verb.add_argument("domain", metavar="DOMAIN", help="the guest's id or name")


def connect_option(verb: argparse.ArgumentParser) -> None:
    """--connect, of what attaches."""
    verb.add_argument("--connect", action="store_true", help="wait until the guest has connected, too")


def detach_options(verb: argparse.ArgumentParser, loss: str) -> None:
    """--force, and what is lost by it; --timeout."""
    verb.add_argument("--force", action="store_true", help=f"do not ask the guest: {loss}")
    timeout_option(verb)


def timeout_option(verb: argparse.ArgumentParser) -> None:
    """--timeout, of what waits for a backend."""
    verb.add_argument(
        "--timeout", type=positive, default=10, metavar="SECONDS", help="how long to wait, as libxl does (default: 10)"
    )


def natural(text: str) -> int:
    """A whole number from 0 on."""
    return _whole_number(text, 0)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole_number(text, 1)


def _whole_number(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def domid(text: str) -> int:
    """The id of a domain."""
    first_reserved = 0x7FF0  # DOMID_FIRST_RESERVED: from here on ids mean self, I/O, ...
    if not (text.isascii() and text.isdigit()) or int(text) >= first_reserved:
        raise argparse.ArgumentTypeError(f"{text!r} is not a domain id (0 to {first_reserved - 1})")
    return int(text)


def switch(text: str) -> bool:
    """on or off."""
    try:
        return {"on": True, "off": False}[text]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off") from None


def unix_address(text: str) -> Path:
    """The path in unix:PATH."""
    scheme, _, path = text.partition(":")
    if scheme != "unix" or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not unix:PATH")
    return Path(path)
