"""The ring alone beside a whole disk: two processes, a full one-page ring, nothing behind it (bench/ring.py)."""

from __future__ import annotations

from typing import Any

from .. import ring, ring_kernels
from ..machine import two_cpus

__all__ = ["RingAlone"]

_LOOK = 200_000  # messages of the run that tells how many make a window


class RingAlone:
    """The ring of `pvdrivers bench ring`, its first row."""

    def __init__(self) -> None:
        self._cpus, self._mhz = two_cpus(), ring._tick_mhz()
        self._row = ring.Row(1, 0, ring_kernels.POLL, None)
        ring._compile()
        self._rate = self._once(_LOOK).rate

    def _once(self, messages: int) -> ring.Result:
        return ring._ours(self._row, messages, self._cpus, self._mhz)

    def run(self, seconds: float) -> dict[str, Any]:
        """One run of about so long, with the figures that an agent answers."""
        messages = int(self._rate * seconds)
        done = self._once(messages)
        return {
            "rate": done.rate,
            "requests": messages,
            "seconds": messages / done.rate,
            "p50_us": done.p50 / 1000,
            "p99_us": done.p99 / 1000,
            "cpu_us": done.cpu / 1000,
        }
