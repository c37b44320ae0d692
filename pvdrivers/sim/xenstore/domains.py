"""The requests on domains, and CONTROL. Source: C xenstored 4.17, xenstored_domain.c and _control.c."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from .operations import OK, number
from .permissions import Refused
from .quota import Domain, Quotas
from .tree import View

if TYPE_CHECKING:
    from .connection import Connection

_log = logging.getLogger(__name__)
_DOMID_FIRST_RESERVED = 0x7FF0  # xen/include/public/xen.h
_DOMID_SELF = 0x7FF0


def _words(payload: bytes, count: int) -> list[bytes]:
    words = payload.split(b"\0")[:-1]
    if len(words) < count:
        raise Refused(errno.EINVAL)
    return words


def _one_domid(payload: bytes) -> int:
    if payload.count(b"\0") != 1 or payload[-1:] != b"\0":
        raise Refused(errno.EINVAL)
    return number(payload[:-1])


def _introduced(conn: Connection, domid: int) -> Domain:
    domain = conn.server.domains.get(domid)
    if domain is None:
        raise Refused(errno.ENOENT)
    return domain


def introduce(conn: Connection, view: View, payload: bytes) -> bytes:
    words = _words(payload, 3)
    domid = number(words[0])
    if not 0 < domid < _DOMID_FIRST_RESERVED or number(words[2]) == 0:
        raise Refused(errno.EINVAL)
    server = conn.server
    if server.domain_exists is not None and not server.domain_exists(domid):
        raise Refused(errno.EINVAL)
    server.introduce(domid)
    return OK


def _guest(conn: Connection, payload: bytes) -> Domain:
    domid = _one_domid(payload)
    if not domid:
        raise Refused(errno.EINVAL)
    return _introduced(conn, domid)


def release(conn: Connection, view: View, payload: bytes) -> bytes:
    conn.server.release(_guest(conn, payload).domid)
    return OK


def resume(conn: Connection, view: View, payload: bytes) -> bytes:
    # xenstored learns of a shutdown from Xen and forgets it here; this one is told of releases only.
    _guest(conn, payload)
    return OK


def get_domain_path(conn: Connection, view: View, payload: bytes) -> bytes:
    return b"/local/domain/%d\0" % _one_domid(payload)


def is_domain_introduced(conn: Connection, view: View, payload: bytes) -> bytes:
    domid = _one_domid(payload)
    return b"T\0" if domid == _DOMID_SELF or domid in conn.server.domains else b"F\0"


def set_target(conn: Connection, view: View, payload: bytes) -> bytes:
    words = _words(payload, 2)
    domain = _introduced(conn, number(words[0]))
    target = _introduced(conn, number(words[1]))
    domain.domids = {domain.domid, target.domid}
    return OK


def control(conn: Connection, view: View, payload: bytes) -> bytes:
    words = payload.split(b"\0")[:-1]
    command = _CONTROL.get(words[0]) if words else None
    if command is None:
        raise Refused(errno.EINVAL)
    return command[0](conn, words[1:])


def _check(conn: Connection, words: list[bytes]) -> bytes:
    if words:
        raise Refused(errno.EINVAL)
    faults = conn.server.nodes.check()
    for fault in faults:
        _log.error("xenstore check: %s", fault)
    return OK if not faults else "\n".join(faults)[:4000].encode() + b"\0"


def _print(conn: Connection, words: list[bytes]) -> bytes:
    if len(words) != 1:
        raise Refused(errno.EINVAL)
    _log.info("control: %s", words[0].decode(errors="replace"))
    return OK


def _quota(conn: Connection, words: list[bytes]) -> bytes:
    quotas = conn.server.quotas
    if not words:
        lines = ["Quota settings:\n"]
        lines += [f"{name:<17}: {getattr(quotas, ours):8d} {what}\n" for name, ours, what in Quotas.WIRE]
        return "".join(lines).encode() + b"\0"
    if words[0] == b"set":
        names = {name.encode(): ours for name, ours, _ in Quotas.WIRE}
        if len(words) != 3 or words[1] not in names or number(words[2]) < 1:
            raise Refused(errno.EINVAL)
        setattr(quotas, names[words[1]], number(words[2]))
        return OK
    if len(words) != 1:
        raise Refused(errno.EINVAL)
    domain = _introduced(conn, number(words[0]))
    use = {
        "nodes": conn.server.nodes.owned(domain.domid),
        "watches": domain.watches,
        "transactions": domain.transactions,
        "outstanding": domain.outstanding,
        "memory": domain.memory,
    }
    lines = [f"Domain {domain.domid}:\n", *(f"{name:<16}: {value:8d}\n" for name, value in use.items())]
    return "".join(lines).encode() + b"\0"


def _help(conn: Connection, words: list[bytes]) -> bytes:
    if words:
        raise Refused(errno.EINVAL)
    return b"".join(b"%s\t%s\n" % (name, parameters) for name, (_, parameters) in _CONTROL.items()) + b"\0"


_CONTROL = {
    b"check": (_check, b""),
    b"print": (_print, b"<string>"),
    b"quota": (_quota, b"[set <name> <val>|<domid>]"),
    b"help": (_help, b""),
}
