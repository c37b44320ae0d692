"""What became of each device, for people: a file that the control thread writes when something has changed.

RUN_DIR/daemons/PID.devices.json is a list of dictionaries: every device of this process, and every directory that it
does not serve, with the reason. `pvdrivers stats` adds the counters of those that are connected.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .host import Host

log = logging.getLogger("pvdrivers.host")

SUFFIX = "devices.json"
_REST_SECONDS = 0.25


class Report:
    """Writes the file, at most every quarter of a second however much happens."""

    def __init__(self, host: Host, path: Path, told: Callable[[str], None] = lambda text: None) -> None:
        """`told` is given a line for people whenever the file is written."""
        self._host = host
        self._path = path
        self._told = told
        self._due = False
        self._failed = False

    def changed(self) -> None:
        """Something has: the file will be written soon."""
        if not self._due:
            self._due = True
            self._host.later(_REST_SECONDS, self.write)

    def write(self) -> None:
        """Write the file now."""
        self._due = False
        found = list(devices(self._host))
        new = self._path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump(found, file)
            os.rename(new, self._path)
            self._failed = False
        except OSError as e:
            if not self._failed:
                log.error("%s: cannot be written: %s; `pvdrivers stats` shows less", self._path, e.strerror)
            self._failed = True
        self._told(summary(found))


def devices(host: Host) -> Iterator[dict[str, Any]]:
    """A dictionary for each device, and for each directory that is not served."""
    for name, facts in sorted(host.stats().items()):
        yield {"device": name, "pid": os.getpid(), **facts}
    for key, waiting in sorted(host.finder.waiting.items()):
        yield _unserved(key, "waiting for another process", waiting.error)
    for key, why in sorted(host.finder.refused.items()):
        yield _unserved(key, "refused", why)


def _unserved(key: tuple[str, int, int], state: str, error: str) -> dict[str, Any]:
    name = "{}-{}-{}".format(*key)
    return {"device": name, "pid": os.getpid(), "state": state, "connected": False, "error": error, "troubles": {}}


def summary(found: list[dict[str, Any]]) -> str:
    """One line."""
    connected = sum(bool(device["connected"]) for device in found)
    trouble = sum(bool(device["error"] or device["troubles"]) for device in found)
    text = f"{len(found)} device{'' if len(found) == 1 else 's'}, {connected} connected"
    return text + (f", {trouble} with trouble (pvdrivers stats)" if trouble else "")
