"""Small kernels for the control thread, while a ring is not yet a worker's."""

from __future__ import annotations

from pvdrivers.worker.batch import seam_of
from pvdrivers.worker.marks import ring_at
from rings.atomics import call
from rings.jit import kernel


@kernel
def wake(wa: int, ra: int) -> None:
    """Notify the guest behind a ring, whatever it asked for."""
    seam = seam_of(wa)
    call(seam["event_notify"], seam["event_ctx"], ring_at(ra)["port"], 0, 0)
