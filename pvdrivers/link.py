"""Messages between the processes of an upgrade (pvdrivers.upgrade): JSON, one a packet. Light to import."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

ENVIRONMENT = "PVDRIVERS_SUCCESSOR_LINK"
"""Number of the descriptor of the link, in the environment of a process that is to take over."""
PACKET = 65536


def send(sock: socket.socket | None, **message: Any) -> bool:
    """One message; False if nobody is there to hear it."""
    if sock is None:
        return False
    try:
        sock.send(json.dumps(message).encode())
        return True
    except OSError:
        return False


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """The next message, None at the end. Raises BlockingIOError on a socket that does not wait."""
    try:
        data = sock.recv(PACKET)
        found = json.loads(data) if data else None
    except (BlockingIOError, TimeoutError):
        raise
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def link_of_successor() -> socket.socket | None:
    """The link to the daemon that this process is to follow; None in any other."""
    number = os.environ.pop(ENVIRONMENT, "")
    if not number.isdigit():
        return None
    link = socket.socket(fileno=int(number))
    link.set_inheritable(False)
    return link
