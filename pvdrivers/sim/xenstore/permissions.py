"""Who may do what to a node: the permission list and its text form.

Source: docs/misc/xenstore.txt (SET_PERMS) and, for the exact rules, C xenstored 4.17: perm_for_conn(),
xs_strings_to_perms(). The first entry names the owner and what everybody else may do; the others name one
domain each.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable

READ = 1
WRITE = 2
OWNER = 4
IGNORE = 8  # the entry was for a domain that is gone; a new one with its domid inherits nothing
EVERYTHING = READ | WRITE | OWNER

Perms = tuple[tuple[int, int], ...]  # (domid, READ | WRITE | IGNORE) each, never empty

DOM0_ONLY: Perms = ((0, 0),)

_LETTERS = {b"n": 0, b"r": READ, b"w": WRITE, b"b": READ | WRITE}
_TEXT = {0: b"n%d\0", READ: b"r%d\0", WRITE: b"w%d\0", READ | WRITE: b"b%d\0"}
_ENTRY = re.compile(rb"([nrwb])([0-9]{1,5})")
_DOMID_MAX = 0xFFFF


class Refused(Exception):
    """A request that gets an XS_ERROR reply; `errno` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


def parse(words: Iterable[bytes]) -> Perms:
    """Permissions from their words, b"n0" for example. Raises Refused(EINVAL)."""
    perms = []
    for word in words:
        match = _ENTRY.fullmatch(word)
        if match is None or int(match[2]) > _DOMID_MAX:
            raise Refused(errno.EINVAL)
        perms.append((int(match[2]), _LETTERS[match[1]]))
    if not perms:
        raise Refused(errno.EINVAL)
    return tuple(perms)


def serialize(perms: Perms) -> bytes:
    """The words again, each with its NUL."""
    return b"".join([_TEXT[bits & (READ | WRITE)] % domid for domid, bits in perms])


def access(perms: Perms, domids: Collection[int]) -> int:
    """READ | WRITE | OWNER as far as a guest has them; `domids` is the guest's own and that of its target."""
    owner, everybody = perms[0]
    if owner in domids:
        return EVERYTHING
    for domid, bits in perms[1:]:
        if domid in domids and not bits & IGNORE:
            return bits
    return everybody


def inherit(perms: Perms, domid: int) -> Perms:
    """What a new child of a node gets: the same, but a guest owns what it creates."""
    return ((domid, perms[0][1]), *perms[1:]) if domid else perms


def forget(perms: Perms, domid: int) -> Perms:
    """The same list for a world in which `domid` is gone (the owner's entry is not touched)."""
    for other, bits in perms[1:]:
        if other == domid and not bits & IGNORE:
            break
    else:
        return perms
    return perms[:1] + tuple((d, bits | IGNORE) if d == domid else (d, bits) for d, bits in perms[1:])
