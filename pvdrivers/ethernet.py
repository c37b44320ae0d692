"""What an Ethernet address and an MTU may be, for whoever reads them: of a command line, or of xenstore."""

from __future__ import annotations

import re
from typing import Final

LEAST_MTU: Final = 68
MOST_MTU: Final = 65521
"""RFC 791; a TAP's largest, and what a packet of 65535 bytes has behind its Ethernet header."""
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def mac_bytes(text: str) -> bytes:
    """Its six bytes. Raises ValueError for what is no address, and for a group's, which nobody can have."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"{text!r} is no address of six bytes such as 00:16:3e:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & 1:
        raise ValueError(f"{text!r} is the address of a group: the first byte has to be even")
    return mac
