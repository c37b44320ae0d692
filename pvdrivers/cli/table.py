"""What a demonstration shows: on a terminal a table whose last row is redrawn, elsewhere a line at a time."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pvdrivers.frontends.blkfront import Blkfront
    from pvdrivers.frontends.load import Result

_COLUMNS = (
    ("phase", 20),
    ("seconds", 8),
    ("IOPS", 9),
    ("MB/s", 8),
    ("p50 us", 8),
    ("p99 us", 8),
    ("depth", 6),
    ("sent", 9),
    ("saved", 9),
    ("wrong", 6),
)
"""Title and width; a narrow terminal shows as many as fit, from the left."""
_PLAIN_EVERY = 2.0  # seconds between lines where nothing can be redrawn


class Table:
    """Rows of a running load. Notifications are those that were sent to the backend, and those that were not needed."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._terminal = self._out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._colour = self._terminal and not os.environ.get("NO_COLOR")
        self._open = False  # the last row stands without its end of line
        self._titled = False
        self._last_line = time.monotonic()
        self._before = (0.0, 0, 0)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._end_row()
        print(text, file=self._out, flush=True)

    def show(self, phase: str, result: Result, disk: Blkfront) -> None:
        """The load as it is; rates are those since the last look."""
        seconds, requests, nbytes = self._before
        if result.seconds <= seconds or result.requests < requests:
            seconds, requests, nbytes = 0.0, 0, 0
        self._before = (result.seconds, result.requests, result.nbytes)
        elapsed = result.seconds - seconds
        rates = ((result.requests - requests) / elapsed, (result.nbytes - nbytes) / elapsed)
        if self._terminal:
            self._row(self._cells(phase, result, disk, rates), end=False)
        elif time.monotonic() - self._last_line >= _PLAIN_EVERY:
            self._last_line = time.monotonic()
            self._row(self._cells(phase, result, disk, rates), end=True)

    def done(self, phase: str, result: Result, disk: Blkfront) -> None:
        """The load is over; rates are those of all of it."""
        self._before = (0.0, 0, 0)
        self._row(self._cells(phase, result, disk, (result.iops, result.bytes_per_second)), end=True)

    def close(self, verdict: str, good: bool) -> None:
        """The last line."""
        self._end_row()
        print(self._paint(verdict, "32;1" if good else "31;1"), file=self._out, flush=True)

    def _cells(self, phase: str, result: Result, disk: Blkfront, rates: tuple[float, float]) -> list[str]:
        return [
            phase,
            f"{result.seconds:.1f}",
            f"{rates[0]:,.0f}",
            f"{rates[1] / 1e6:,.1f}",
            _number(result.latency_us(0.50)),
            _number(result.latency_us(0.99)),
            str(sum(queue.in_flight for queue in disk.queues)),
            f"{result.notify_sent:,}",
            f"{result.notify_saved:,}",
            f"{result.errors + result.mismatches:,}",
        ]

    def _row(self, cells: list[str], *, end: bool) -> None:
        if not self._titled:
            self._titled = True
            print(self._paint(self._format([title for title, _ in _COLUMNS]), "1"), file=self._out)
        line = self._format(cells)
        if self._terminal:
            # Back to the beginning of the line, and clear what was longer.
            self._out.write(f"\r{line}\x1b[K" + ("\n" if end else ""))
            self._open = not end
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def _format(self, cells: list[str]) -> str:
        room = shutil.get_terminal_size((120, 24)).columns - 1 if self._terminal else 1000
        line = ""
        for i, (cell, (_, width)) in enumerate(zip(cells, _COLUMNS)):
            part = f"{cell:<{width}}" if i == 0 else f" {cell:>{width}}"
            if len(line) + len(part) > room:
                break
            line += part
        return line or cells[0][: max(0, room)]

    def _end_row(self) -> None:
        if self._open:
            self._out.write("\n")
            self._open = False

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def _number(us: float) -> str:
    return "-" if us != us else f"{us:,.0f}"
