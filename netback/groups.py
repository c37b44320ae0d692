"""The groups that a guest listens to, kept for the daemon that comes after one that was killed; see `multicast`.

The worker writes the list where it stands, in such an order that it is one at each step; so a process that dies within
an amendment leaves the list before it or behind it, with a group in it twice at the worst. What it has not answered is
on the ring, and is made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .kept_file import KeptFile, connection_of
from .records import GROUPS, MOST_GROUPS

if TYPE_CHECKING:
    from .backend import Front, VifBackend


def keep_groups(device: VifBackend, said: Front, recover: bool) -> bool:
    """Have the list of a vif's port in its file, empty for a new connection. Whether it is known: not if a process
    before this one had it, and its file is not there. Raises PvError without room."""
    file = device.kept.open("groups", GROUPS, connection_of(device, said), recover=recover)
    if file.found:
        tidy(file)
    device.port.use_groups(file)
    return file.found or not recover


def tidy(file: KeptFile) -> None:
    """Make a list of whatever is found: each once, and no more than there may be."""
    row = file.record[0]
    listed = sorted(set(row["listed"][: min(int(row["count"]), MOST_GROUPS)].tolist()))
    row["count"] = len(listed)
    row["listed"][: len(listed)] = listed
