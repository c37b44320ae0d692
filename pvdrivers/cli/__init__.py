"""The ``pvdrivers`` command.

Nothing heavy is imported here: ``--help`` and a mistyped option answer at once. The body of each verb is
``run(args) -> int`` in the module of its name (with _ for -) in this package, and is imported when that verb is used.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from pvdrivers.cli.arguments import parser
from pvdrivers.errors import ConfigError, PvError, UnavailableError

if TYPE_CHECKING:
    import argparse

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
"""As argparse has it; and of a service that is told what cannot be: to start it again would change nothing."""
EXIT_UNAVAILABLE = os.EX_UNAVAILABLE
"""The same of a host that lacks what it takes to serve, such as /dev/xen/gntdev."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
EXIT_TERMINATED = 128 + signal.SIGTERM

# These run until they are told to stop: SIGTERM is their orderly end and no failure.
_SERVICES = frozenset({"sim", "serve", "guest", "capture"})


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that only ``finally`` blocks see it pass."""


class _Verb(Protocol):
    def run(self, args: argparse.Namespace) -> int: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help, or the error with the usage
        return _flushed(stop.code if isinstance(stop.code, int) else EXIT_FAILED)
    # OpenBLAS otherwise starts a thread per core when numpy is imported; nothing here does linear algebra.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        verb = cast(_Verb, importlib.import_module(f"pvdrivers.cli.{args.verb.replace('-', '_')}"))
        return _flushed(verb.run(args))
    except PvError as error:
        print(f"pvdrivers: error: {error}", file=sys.stderr)
        return _flushed(_status_of(error) if args.verb == "serve" else EXIT_FAILED)
    except KeyboardInterrupt:
        return _flushed(EXIT_INTERRUPTED)
    except Terminated:
        return _flushed(EXIT_OK if args.verb in _SERVICES else EXIT_TERMINATED)
    except BrokenPipeError:
        if not _reader_of_stdout_is_gone():
            raise  # some socket of ours, and that is a fault to be seen
        return _leave_stdout()
    except Exception as error:
        if not _is_cache_error(error):
            raise
        print(f"pvdrivers: error: {error}", file=sys.stderr)
        return _flushed(EXIT_FAILED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _status_of(error: PvError) -> int:
    """What a service manager is told of it: the unit of examples/dom0 tries all but EXIT_FAILED no more."""
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, UnavailableError) else EXIT_FAILED


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _is_cache_error(error: Exception) -> bool:
    # rings.jit refuses a cache directory of others while it is being imported, so that neither the module
    # nor its exception class can be had afterwards; and importing it up here would import numba for --help.
    return (type(error).__module__, type(error).__name__) == ("rings.cache", "CacheDirError")


def _flushed(status: int) -> int:
    """Write out what is buffered while a reader that went away can still be met quietly."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_stdout()
    return status


def _reader_of_stdout_is_gone() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _leave_stdout() -> int:
    """The reader went away (``| head``): end as a C program would, without a word."""
    # The interpreter flushes stdout once more at exit, and must find somewhere to put it.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return EXIT_BROKEN_PIPE
