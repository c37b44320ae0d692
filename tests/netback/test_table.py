"""The table of a switch: what it may forget, and what it must not say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netback.records import COMMON, MAX_LEARNED, PORT, SWITCH, TABLE_BITS, TABLE_ENTRY, VLAN_SHIFT
from netback.switch import _bits
from netback.table import AGE_NS, join, learn, lookup

PORTS = 4


class Table:
    def __init__(self) -> None:
        self.switch, self.ports = np.zeros(1, SWITCH), np.zeros(PORTS, PORT)
        self.entries = np.zeros(1 << TABLE_BITS, TABLE_ENTRY)
        self.switch[0]["table"], self.switch[0]["top"] = self.entries.ctypes.data, PORTS
        self.epochs = 0
        for i in range(PORTS):
            self.join(i)

    def join(self, i: int) -> None:
        self.epochs += 1
        self.ports[i] = np.zeros((), PORT)
        self.ports[i]["index"], self.ports[i]["epoch"] = i, self.epochs
        self.switch[0]["ports"][i] = self.address(i)

    def leave(self, i: int) -> None:
        self.switch[0]["ports"][i] = 0

    def address(self, i: int) -> int:
        return int(self.ports.ctypes.data) + i * PORT.itemsize

    def learn(self, i: int, mac: int, now: int, fixed: int = 0) -> bool:
        return bool(learn(self.switch.ctypes.data, self.address(i), mac, now, fixed))

    def lookup(self, mac: int, now: int) -> int:
        return int(lookup(self.switch.ctypes.data, mac, now))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["learn", "learn", "learn", "fix", "rejoin", "wait"]),
        st.integers(0, PORTS - 1),
        st.integers(1, 12),
    ),
    max_size=60,
)


@given(STEPS)
def test_against_a_dictionary(steps: list[tuple[str, int, int]]) -> None:
    """Few addresses, so that none is pushed out."""
    table, now = Table(), 0
    known: dict[int, tuple[int, int, bool]] = {}  # address -> port, when, fixed
    for what, port, mac in steps:
        if what == "wait":
            now += AGE_NS // 3
        elif what == "rejoin":
            table.leave(port)
            table.join(port)
            known = {m: k for m, k in known.items() if k[0] != port}
        else:
            before = known.get(mac)
            taken = before is not None and before[2] and before[0] != port
            assert table.learn(port, mac, now, int(what == "fix")) == (not taken)
            if not taken:
                fixed = what == "fix" or (before is not None and before[2])
                known[mac] = (port, now, fixed)
        known = {m: k for m, k in known.items() if k[2] or now - k[1] < AGE_NS}
        for m in range(1, 13):
            assert table.lookup(m, now) == (known[m][0] if m in known else -1)


def test_who_floods_the_table_pushes_out_his_own() -> None:
    table = Table()
    macs = [0x1234_0000_0000 | k * 0x10001 for k in range(200)]
    for mac in macs:
        table.learn(0, mac, 1)
    table.learn(1, 0xABCDEF, 1, 1)
    there = [mac for mac in macs if table.lookup(mac, 2) == 0]
    assert len(there) == 200
    for k in range(20_000):
        table.learn(2, (k * 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFE, 2)
    assert int(table.ports[2]["learned"][0]) <= MAX_LEARNED
    lost = [mac for mac in there if table.lookup(mac, 3) != 0]
    assert len(lost) <= 4  # before it had many, it took what was oldest
    assert table.lookup(0xABCDEF, 3) == 1
    assert sum(int(port["learned"][0]) for port in table.ports) == int((table.entries["epoch"] != 0).sum())


SHARDS = 3


class Shards(Table):
    """Ports with queues in all of three shards."""

    def __init__(self) -> None:
        self.common = np.zeros(1, COMMON)
        self.switches = np.zeros(SHARDS, SWITCH)
        self.tables = np.zeros((SHARDS, 1 << TABLE_BITS), TABLE_ENTRY)
        self.ports, self.epochs = np.zeros(PORTS, PORT), 0
        size = SWITCH.itemsize
        for s, row in enumerate(self.switches):
            row["shard"], row["shards"], row["common"] = s, SHARDS, self.common.ctypes.data
            row["table"], row["top"] = self.tables[s].ctypes.data, PORTS
            row["peers"][:SHARDS] = [self.switches.ctypes.data + k * size for k in range(SHARDS)]
        for i in range(PORTS):
            self.join(i)

    def join(self, i: int) -> None:
        self.epochs += 1
        self.ports[i] = np.zeros((), PORT)
        self.ports[i]["index"], self.ports[i]["epoch"] = i, self.epochs
        self.switches["ports"][:, i] = self.address(i)

    def leave(self, i: int) -> None:
        self.switches["ports"][:, i] = 0

    def at(self, shard: int) -> int:
        return int(self.switches.ctypes.data) + shard * SWITCH.itemsize


@given(
    st.lists(
        st.tuples(st.sampled_from(["learn"] * 6 + ["fix", "rejoin", "wait"]), st.integers(0, PORTS - 1),
                  st.integers(1, 4), st.integers(0, SHARDS - 1)),
        max_size=60,
    )
)  # fmt: skip
def test_shards_against_a_dictionary(steps: list[tuple[str, int, int, int]]) -> None:
    """Whoever has seen an address last is right, whichever shard asks. Only when that port has gone, what another shard
    has seen before may count again, until the address is seen anew."""
    table, now = Shards(), 0
    orphans: set[int] = set()
    known: dict[int, tuple[int, int, bool]] = {}  # address -> port, when, fixed
    for what, port, mac, shard in steps:
        if what == "wait":
            now += AGE_NS // 3
        elif what == "rejoin":
            table.leave(port)
            table.join(port)
            orphans |= {m for m, k in known.items() if k[0] == port}
            known = {m: k for m, k in known.items() if k[0] != port}
        else:
            before = known.get(mac)
            taken = before is not None and before[2] and before[0] != port
            for s in range(SHARDS) if what == "fix" else (shard,):
                assert bool(learn(table.at(s), table.address(port), mac, now, int(what == "fix"))) == (not taken)
            if not taken:
                orphans.discard(mac)
                known[mac] = (port, now, what == "fix" or (before is not None and before[2]))
        known = {m: k for m, k in known.items() if k[2] or now - k[1] < AGE_NS}
        for m in set(range(1, 5)) - orphans:
            expected = known[m][0] if m in known else -1
            assert [int(lookup(table.at(s), m, now)) for s in range(SHARDS)] == [expected] * SHARDS
    assert (table.tables["version"] & 1 == 0).all()


def test_what_another_shard_is_just_writing_is_not_believed() -> None:
    table = Shards()
    learn(table.at(0), table.address(1), 77, 0, 0)
    assert lookup(table.at(1), 77, 0) == 1
    (row,) = np.flatnonzero(table.tables[0]["mac"] == 77)
    table.tables[0][row]["version"] += 1  # between the two halves of a change
    table.tables[0][row]["port"] = 1 << 40
    assert lookup(table.at(1), 77, 0) == -1


@pytest.mark.parametrize("shards", [1, SHARDS])
def test_a_trunks_own_address_is_its_in_its_vlans(shards: int) -> None:
    """It is fixed in no VLAN alone. What was learned before it was there is forgotten."""
    table = Table() if shards == 1 else Shards()
    switches = [int(table.switch.ctypes.data)] if shards == 1 else [table.at(s) for s in range(SHARDS)]  # type: ignore[attr-defined]
    mac, guest, trunk = 0xA53E1600, table.address(0), table.address(1)
    in_vlan = {vlan: mac | vlan << VLAN_SHIFT for vlan in (5, 6, 4094)}
    for vlan in (5, 6):
        assert learn(switches[0], guest, in_vlan[vlan], 0, 0)
    table.ports[1]["mac"], table.ports[1]["trunk"], table.ports[1]["allowed"] = mac, 1, _bits({5, 4094})
    for at in switches:
        join(at, trunk, 1)
    for at in switches:
        assert [int(lookup(at, in_vlan[vlan], 1)) for vlan in (5, 6, 4094)] == [1, 0, 1]
        assert not learn(at, guest, in_vlan[5], 1, 0)
        assert not learn(at, guest, in_vlan[4094], 1, 0)
        assert learn(at, guest, in_vlan[6], 1, 0)
        assert learn(at, trunk, in_vlan[5], 1, 0)
        assert int(lookup(at, in_vlan[5], 1)) == int(lookup(at, mac, 1)) == 1
    assert int(table.ports[0]["learned"][0]) == 1
    table.leave(1)
    assert [int(lookup(at, in_vlan[5], 1)) for at in switches] == [-1] * len(switches)
    assert learn(switches[0], guest, in_vlan[5], 1, 0)
