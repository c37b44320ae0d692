"""Any number of openers of one image, in any order: who may have it follows from three rules."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

from pvdrivers.errors import DeviceBusyError
from pvdrivers.storage import locks
from pvdrivers.storage.store import Store, open_store
from pvdrivers.storage.uri import parse_disk


class Sharing(RuleBasedStateMachine):
    """One writer; or readers; or writers that all said w!. And one opener for each device."""

    opened = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.image = Path(self.directory.name) / "disk.img"
        self.image.write_bytes(bytes(4096))
        self.users: dict[int, tuple[str, str]] = {}
        self.stores: dict[int, Store] = {}
        # Somebody else's lock is believed at once here, and nobody asks /proc whose it is.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(locks, "holders", lambda fd, trouble: [])
        self.patch.setattr(locks, "_SETTLE_S", 0.0)

    @rule(target=opened, mode=st.sampled_from(["r", "w", "w!"]), identity=st.sampled_from("abc"))
    def open(self, mode: str, identity: str) -> object:
        allowed = all(mode == m != "w" and identity != i for m, i in self.users.values())
        spec = parse_disk(f"{self.image},mode={mode}")
        try:
            store = open_store(spec, run_dir=self.directory.name, identity=identity)
        except DeviceBusyError:
            assert not allowed
            return multiple()
        assert allowed
        self.users[store.fd] = (mode, identity)
        self.stores[store.fd] = store
        return store.fd

    @rule(fd=consumes(opened))
    def close(self, fd: int) -> None:
        del self.users[fd]
        self.stores.pop(fd).close()

    def teardown(self) -> None:
        for store in self.stores.values():
            store.close()
        self.patch.undo()
        self.directory.cleanup()


TestSharing = Sharing.TestCase
