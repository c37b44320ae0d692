"""Three domains at work on one store, against a model that is a dict and copies whatever it likes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pvdrivers import xs_wire as wire

NODE_QUOTA = 6
OK = b"OK\0"
BASES = [b"/s", b"/local/domain/1", b"/local/domain/2"]
PATHS = st.builds(
    lambda base, names: b"/".join([base, *names]),
    st.sampled_from(BASES),
    st.lists(st.sampled_from([b"a", b"b"]), max_size=3),
)
WHO = st.integers(0, 2)
PERMS = st.lists(st.tuples(st.sampled_from("nrwb"), st.integers(0, 2)), min_size=1, max_size=3)


class ModelNode:
    def __init__(self, value: bytes, perms: list[tuple[str, int]], version: int, kids: set[bytes]) -> None:
        self.value, self.perms, self.version, self.kids = value, perms, version, kids

    def copy(self) -> ModelNode:
        return ModelNode(self.value, list(self.perms), self.version, set(self.kids))


def up(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


class Refusal(Exception):
    pass


class World:
    """Nodes by path, copied one by one as they are used if this is a transaction's."""

    def __init__(self, nodes: dict[bytes, ModelNode | None], outer: World | None = None) -> None:
        self.nodes = nodes
        self.outer = outer
        self.used: dict[bytes, int] = {}  # versions, 0 for nothing there
        self.first: dict[bytes, int | None] = {}  # owners
        self.created = False
        self.touched: set[int] = set()  # owners of nodes made, removed or given away

    def get(self, path: bytes) -> ModelNode | None:
        if path not in self.nodes and self.outer is not None:
            node = self.outer.nodes.get(path)
            self.nodes[path] = node.copy() if node else None
            self.used[path] = node.version if node else 0
            self.first[path] = node.perms[0][1] if node else None
        return self.nodes.get(path)

    def there(self, path: bytes) -> ModelNode:
        node = self.get(path)
        assert node is not None
        return node

    def may(self, who: int, node: ModelNode, need: str) -> bool:
        if who == 0 or node.perms[0][1] == who:
            return True
        letter = next((letter for letter, domid in node.perms[1:] if domid == who), node.perms[0][0])
        return need != "owner" and letter in {"read": "rb", "write": "wb"}[need]

    def find(self, who: int, path: bytes, need: str) -> ModelNode | None:
        node = self.get(path)
        if node is None:
            if who or self.outer is not None:
                above = up(path)
                while self.get(above) is None:
                    above = up(above)
                if not self.may(who, self.there(above), "write" if need == "owner" else need):
                    raise Refusal(errno.EACCES)
        elif not self.may(who, node, need):
            raise Refusal(errno.EACCES)
        return node

    def create(self, who: int, path: bytes, value: bytes, tick: Callable[[], int]) -> None:
        missing = [path]
        while self.get(up(missing[-1])) is None:
            missing.append(up(missing[-1]))
        # In a transaction only what is there outside of it counts; the rest when it ends.
        full = self.owned(who) + len(missing) > NODE_QUOTA
        if self.outer is not None:
            full = self.outer.owned(who) >= NODE_QUOTA
        if who and full:
            raise Refusal(errno.ENOSPC)
        self.created = True
        perms = self.there(up(missing[-1])).perms
        if who:
            perms = [(perms[0][0], who), *perms[1:]]
        self.touched.add(perms[0][1])
        for new in reversed(missing):
            parent = self.there(up(new))
            parent.kids.add(new.rpartition(b"/")[2])
            parent.version = tick()
            self.nodes[new] = ModelNode(b"", list(perms), tick(), set())
        self.there(path).value = value

    def owned(self, who: int) -> int:
        return sum(node.perms[0][1] == who for node in self.nodes.values() if node)

    @property
    def delta(self) -> dict[int, int]:
        changes: dict[int, int] = {}
        for path, node in self.nodes.items():
            for owner, change in ((self.first[path], -1), (node.perms[0][1] if node else None, 1)):
                if owner is not None:
                    changes[owner] = changes.get(owner, 0) + change
        return changes


def machine(new_store: Callable[..., Any]) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.store = new_store(nodes=NODE_QUOTA)
            self.peers = [self.store.connect(), self.store.guest(1), self.store.guest(2)]
            self.clock = 0
            self.world = World({b"/": ModelNode(b"", [("n", 0)], self.tick(), set())})
            for path in (b"/tool/xenstored", b"/local/domain/1", b"/local/domain/2"):
                self.world.create(0, path, b"", self.tick)
            for who in (1, 2):
                self.world.there(b"/local/domain/%d" % who).perms = [("n", who)]
            # For each domain at most one transaction: its number and what it sees.
            self.open: dict[int, tuple[int, World]] = {}

        def tick(self) -> int:
            self.clock += 1
            return self.clock

        def at(self, who: int, inside: bool) -> tuple[World, int]:
            if inside and who in self.open:
                return self.open[who][1], self.open[who][0]
            return self.world, 0

        def check(self, who: int, real: bytes | int, expected: Callable[[], bytes]) -> None:
            try:
                wanted: bytes | int = expected()
            except Refusal as e:
                wanted = int(e.args[0])
            assert real == wanted

        @rule(who=WHO, inside=st.booleans(), path=PATHS, value=st.sampled_from([b"", b"1", b"22"]))
        def write(self, who: int, inside: bool, path: bytes, value: bytes) -> None:
            world, tx = self.at(who, inside)

            def expected() -> bytes:
                node = world.find(who, path, "write")
                if node is None:
                    world.create(who, path, value, self.tick)
                else:
                    node.value, node.version = value, self.tick()
                return OK

            self.check(who, self.peers[who].write(path, value, tx), expected)

        @rule(who=WHO, inside=st.booleans(), path=PATHS)
        def mkdir(self, who: int, inside: bool, path: bytes) -> None:
            world, tx = self.at(who, inside)

            def expected() -> bytes:
                if world.find(who, path, "write") is None:
                    world.create(who, path, b"", self.tick)
                return OK

            self.check(who, self.peers[who].ask(wire.XS_MKDIR, path, tx=tx), expected)

        @rule(who=WHO, inside=st.booleans(), path=PATHS)
        def read(self, who: int, inside: bool, path: bytes) -> None:
            world, tx = self.at(who, inside)

            def expected() -> bytes:
                node = world.find(who, path, "read")
                if node is None:
                    raise Refusal(errno.ENOENT)
                return node.value

            self.check(who, self.peers[who].read(path, tx), expected)

        @rule(who=WHO, inside=st.booleans(), path=PATHS)
        def directory(self, who: int, inside: bool, path: bytes) -> None:
            world, tx = self.at(who, inside)
            real = self.peers[who].ask(wire.XS_DIRECTORY, path, tx=tx)
            if isinstance(real, bytes):
                real = b"\0".join(sorted(real.split(b"\0")))

            def expected() -> bytes:
                if world.find(who, path, "read") is None:
                    raise Refusal(errno.ENOENT)
                names = world.there(path).kids
                return b"\0".join(sorted([*names, b""]))

            self.check(who, real, expected)

        @rule(who=WHO, inside=st.booleans(), path=PATHS)
        def rm(self, who: int, inside: bool, path: bytes) -> None:
            if path in BASES:
                return
            world, tx = self.at(who, inside)

            def expected() -> bytes:
                if world.find(who, path, "write") is None:
                    if world.get(up(path)) is None:
                        raise Refusal(errno.ENOENT)
                    return OK
                doomed = [path]
                for gone in doomed:
                    doomed += [gone + b"/" + kid for kid in world.there(gone).kids]
                for gone in doomed:
                    world.touched.add(world.there(gone).perms[0][1])
                    world.nodes[gone] = None
                parent = world.there(up(path))
                parent.kids.remove(path.rpartition(b"/")[2])
                parent.version = self.tick()
                return OK

            self.check(who, self.peers[who].ask(wire.XS_RM, path, tx=tx), expected)

        @rule(who=WHO, inside=st.booleans(), path=PATHS, perms=PERMS)
        def set_perms(self, who: int, inside: bool, path: bytes, perms: list[tuple[str, int]]) -> None:
            world, tx = self.at(who, inside)
            words = [f"{letter}{domid}".encode() for letter, domid in perms]

            def expected() -> bytes:
                node = world.find(who, path, "owner")
                if node is None:
                    raise Refusal(errno.ENOENT)
                if who and perms[0][1] != node.perms[0][1]:
                    raise Refusal(errno.EPERM)
                world.touched |= {node.perms[0][1], perms[0][1]}
                node.perms, node.version = list(perms), self.tick()
                return OK

            self.check(who, self.peers[who].ask(wire.XS_SET_PERMS, path, *words, tx=tx), expected)

        @rule(who=WHO)
        def begin(self, who: int) -> None:
            if who not in self.open:
                self.open[who] = self.peers[who].begin(), World({}, self.world)

        @rule(who=WHO, commit=st.booleans())
        def end(self, who: int, commit: bool) -> None:
            if who not in self.open:
                return
            tx, world = self.open.pop(who)

            def expected() -> bytes:
                if not commit:
                    return OK
                if who and world.created:
                    for domid in world.touched - {0}:
                        if self.world.owned(domid) + world.delta.get(domid, 0) >= NODE_QUOTA:
                            raise Refusal(errno.ENOSPC)
                for path, version in world.used.items():
                    node = self.world.nodes.get(path)
                    if (node.version if node else 0) != version:
                        raise Refusal(errno.EAGAIN)
                for path, node in world.nodes.items():
                    if (node.version if node else 0) != world.used[path]:
                        self.world.nodes[path] = node
                        if node:
                            node.version = self.tick()
                return OK

            self.check(who, self.peers[who].end(tx, commit), expected)

        def teardown(self) -> None:
            self.store.close()

        @invariant()
        def same(self) -> None:
            assert self.store.server.nodes.check() == []
            real = self.store.server.nodes.nodes
            model = {path: node for path, node in self.world.nodes.items() if node}
            assert real.keys() == model.keys()
            for path, node in model.items():
                assert real[path].value == node.value
                assert set(real[path].children) == node.kids
                perms = [f"{letter}{domid}" for letter, domid in node.perms]
                assert self.store.server.tree.get_perms(path.decode()) == perms

    return Machine


def test_three_domains(new_store: Callable[..., Any]) -> None:
    run_state_machine_as_test(
        machine(new_store), settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
