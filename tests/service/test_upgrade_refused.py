"""What `pvdrivers upgrade` does not begin with."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pvdrivers import link
from pvdrivers.upgrade import Old


@pytest.mark.parametrize("force", [False, True])
def test_what_xenstore_has_forgotten_is_not_let_go(monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    """Its directory is not there, so no successor would ever find it."""
    life = SimpleNamespace(ident="vbd-1-51712", troubles=SimpleNamespace(now={"lost": "xenstore was restarted"}))
    heard: list[Callable[[], None]] = []
    host: Any = SimpleNamespace(
        lives={"vbd/1/51712": life}, listeners=[], stopping=False, finder=SimpleNamespace(passive=False),
        context=SimpleNamespace(options={}), hear=lambda fd, what: heard.append(what), unhear=lambda fd: None,
    )  # fmt: skip
    started: list[object] = []
    monkeypatch.setattr(Old, "_start", lambda self, sock, timeout: started.append(sock))
    listener = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener, ours, theirs:
        old = Old(host, listener, ["serve"], lambda pid: None)
        link.send(theirs, do="upgrade", timeout=1, force=force)
        old._request(ours)
        assert bool(started) == force
        if not force:
            message = link.receive(theirs)
            assert message is not None and message["event"] == "failed"
            assert "has forgotten vbd-1-51712, which nobody could take over: end its guest first" in message["why"]
