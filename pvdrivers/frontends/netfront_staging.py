"""Staging grants on the guest's side: a backend that offers it keeps the pages of a queue mapped (netif.h, "Static
Grants").

netfront grants its pages once and uses them again and again, so each that is kept mapped saves the backend a grant
copy a time.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np

from rings.netif import CTRL_ADD_GREF_MAPPING, CTRL_GET_GREF_MAPPING_SIZE, GREF, GREF_readonly

from .netfront_control import ControlRing

__all__ = ["offered", "stage"]

_PAGE_ENTRIES = 512


def offered(ring: ControlRing, queue: int, timeout: float = 5.0) -> int:
    """How many pages of a queue the backend would keep mapped, 0 if it has no such thing. OSError as ask()."""
    try:
        return ring.ask(CTRL_GET_GREF_MAPPING_SIZE, queue, timeout=timeout)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return 0


def stage(ring: ControlRing, queue: int, sent: Sequence[int], received: Sequence[int], timeout: float) -> int:
    """Have a queue's pages kept mapped, as many as the backend offers: how many are, 0 if it offers none.

    `sent` and `received` are their grefs, the ones that are used most first. OSError as ControlRing.ask().
    """
    most = offered(ring, queue, timeout)
    # Buffers are used in turn, and what is sent mostly from the same few pages.
    few = list(sent[: max(most // 4, most - len(received))])
    wanted = np.zeros(min(most, len(few) + len(received)), GREF)
    wanted["ref"] = (few + list(received))[: len(wanted)]
    wanted["flags"][: len(few)] = GREF_readonly
    for at in range(0, len(wanted), _PAGE_ENTRIES):
        part = wanted[at : at + _PAGE_ENTRIES]
        ring.ask_with(CTRL_ADD_GREF_MAPPING, part.tobytes(), queue, None, len(part), timeout=timeout)
    return len(wanted)
