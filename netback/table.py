"""Which address is behind which port. Pure kernels over the table of a shard; only its worker writes to it.

A port's own address - what the toolstack has given the vif - is fixed: nobody else can be learned under it. All others
are learned from what is sent, may move from port to port as guests within guests do, and are forgotten after AGE_NS.
A full neighbourhood of the table gives up what was seen longest ago. A `mac` here has its VLAN above the six bytes.

A trunk's own address is its in all of its VLANs, but has one entry, in no VLAN: where nothing else is known of an
address in a VLAN, that is looked for.

Where a switch has several shards, each has all ports' own addresses, and those that were learned of what came in there.
What is not in its own table is looked for in the others', and what may have moved since as well: COMMON.moves counts
what was learned anew, and an entry has the count of when it was found last. As long as that has not changed, nothing
has moved. Of two entries that of the later count is the one.

The entry of another shard's table is written by that while it is read here, so it has a version (a seqlock): odd while
it is being changed, and another afterwards.
"""

from __future__ import annotations

from typing import Any

from rings.atomics import fetch_add64, full_barrier, i64, load_acquire64, records, store_release64
from rings.jit import inline, kernel

from .records import (
    JOINS_AT,
    MAX_LEARNED,
    MAX_LEARNED_OUTSIDE,
    PORT_VIF,
    TABLE_BITS,
    TABLE_ENTRY,
    TABLE_PROBES,
    VLAN_SHIFT,
    port_at,
    switch_at,
)
from .vlan import has_vlan

AGE_NS = 300_000_000_000
"""As long as Linux's bridge keeps an address."""
FRESH_NS = 1_000_000_000
"""As long as that an entry counts as seen just now: other shards read it, and would lose it from their caches."""
_NO_STAMP = -1
_SIZE = TABLE_ENTRY.itemsize
_MASK = (1 << TABLE_BITS) - 1


@inline
def _place(swa: int, mac: int, probe: int) -> int:
    hash = (((mac ^ mac >> 17 ^ mac >> VLAN_SHIFT) & 0x7FFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF) >> (32 - TABLE_BITS)
    return switch_at(swa)["table"] + ((hash + probe) & _MASK) * _SIZE


@inline
def _entry_at(at: int) -> Any:
    return records(at, 1, TABLE_ENTRY)[0]


@inline
def _entry(swa: int, mac: int, probe: int) -> Any:
    return _entry_at(_place(swa, mac, probe))


@inline
def _owner(swa: int, entry: Any) -> int:
    """The address of the port that an entry is of, 0 if that is not there any more."""
    porta = switch_at(swa)["ports"][entry["port"]]
    if entry["epoch"] == 0 or porta == 0 or port_at(porta)["epoch"] != entry["epoch"]:
        return i64(0)
    return porta


@inline
def _alive(swa: int, entry: Any, now: int) -> bool:
    """Whether an entry says something: its port is still the one that it was learned of, and it is not too old."""
    return _owner(swa, entry) != 0 and (entry["fixed"] != 0 or now - entry["seen"] < AGE_NS)


@kernel
def _read(swa: int, other: int, mac: int, now: int) -> int:
    """What the table of another shard says: the index of a port, and above it the stamp; -1 if it says nothing."""
    for k in range(TABLE_PROBES):
        at = _place(other, mac, k)
        version = load_acquire64(at)  # TABLE_ENTRY.version is the first field
        entry = _entry_at(at)
        if entry["mac"] != mac or version & 1 != 0:
            continue
        index, epoch, seen = i64(entry["port"]), i64(entry["epoch"]), i64(entry["seen"])
        stamp, fixed = i64(entry["stamp"]), i64(entry["fixed"])
        # All of these before the version once more. Pairs with the barrier in _write.
        full_barrier()
        if load_acquire64(at) != version or epoch == 0 or entry["mac"] != mac:
            continue
        porta = switch_at(swa)["ports"][index]
        if porta != 0 and port_at(porta)["epoch"] == epoch and (fixed != 0 or now - seen < AGE_NS):
            return stamp << 16 | index
    return i64(-1)


@kernel
def _elsewhere(swa: int, mac: int, now: int, stamp: int) -> int:
    """As _read(), of all other shards: what is later than `stamp`, and the latest of that."""
    sw = switch_at(swa)
    found = stamp << 16 | 0xFFFF if stamp >= 0 else i64(-1)
    newest = i64(-1)
    for t in range(sw["shards"]):
        if t != sw["shard"]:
            said = i64(_read(swa, sw["peers"][t], mac, now))
            if said > found:
                found, newest = said, said
    return newest


@kernel
def _trunk_of(swa: int, mac: int) -> int:
    """The index of the trunk whose own address this is in a VLAN that the trunk has; -1 if there is none."""
    own = mac & (1 << VLAN_SHIFT) - 1
    if own == mac:
        return i64(-1)
    for k in range(TABLE_PROBES):
        entry = _entry(swa, own, k)
        if entry["mac"] == own and entry["fixed"] != 0:
            porta = _owner(swa, entry)
            if porta != 0 and has_vlan(porta, mac >> VLAN_SHIFT):
                return i64(entry["port"])
    return i64(-1)


@kernel
def lookup(swa: int, mac: int, now: int) -> int:
    """The index of the port that an address is behind, -1 if it is not known."""
    index, stamp = i64(-1), i64(_NO_STAMP)
    for k in range(TABLE_PROBES):
        entry = _entry(swa, mac, k)
        if entry["mac"] == mac and _alive(swa, entry, now):
            if entry["fixed"] != 0:
                return i64(entry["port"])
            index, stamp = i64(entry["port"]), i64(entry["stamp"])
            break
    if index < 0:
        index = i64(_trunk_of(swa, mac))
        if index >= 0:
            return index
    sw = switch_at(swa)
    if sw["shards"] <= 1 or stamp == load_acquire64(sw["common"]):  # COMMON.moves is the first field
        return index
    said = i64(_elsewhere(swa, mac, now, stamp))
    return said & 0xFFFF if said >= 0 else index


@inline
def _age(swa: int, porta: int, entry: Any, now: int) -> int:
    """How readily an entry is given up: ns since it was seen, -1 never. A port that has many gives up its own."""
    owner = _owner(swa, entry)
    most = MAX_LEARNED if port_at(porta)["kind"] <= PORT_VIF else MAX_LEARNED_OUTSIDE
    if owner != porta and port_at(porta)["learned"][switch_at(swa)["shard"]] >= most:
        return i64(-1)
    if owner == 0:
        return i64(1) << 62
    return i64(-1) if entry["fixed"] != 0 else now - entry["seen"]


@kernel
def _restamp(swa: int, at: int, porta: int, now: int) -> None:
    """An address is where this table says, and something was learned anew since it was found here last. If it was that
    one, at another port, it has come back."""
    sw = switch_at(swa)
    entry = _entry_at(at)
    moves = load_acquire64(sw["common"])  # before the others: what they learn from here on is another count
    said = i64(_elsewhere(swa, entry["mac"], now, entry["stamp"] - 1))
    if said >= 0 and said & 0xFFFF != port_at(porta)["index"]:
        moves = i64(fetch_add64(sw["common"], 1)) + 1
    entry["stamp"] = moves


@kernel
def _write(swa: int, at: int, porta: int, mac: int, now: int, fixed: int) -> None:
    """Make an entry anew. Others see it before they see that something was."""
    sw, port = switch_at(swa), port_at(porta)
    entry = _entry_at(at)
    version = i64(entry["version"])
    if sw["shards"] > 1:
        store_release64(at, version + 1)
        # It is odd before anything of it changes. Pairs with the barrier in _read.
        full_barrier()
    entry["mac"], entry["port"], entry["epoch"] = mac, port["index"], port["epoch"]
    entry["seen"], entry["fixed"] = now, fixed
    if sw["shards"] > 1:
        entry["stamp"] = load_acquire64(sw["common"]) + 1
        store_release64(at, version + 2)
        fetch_add64(sw["common"], 1)


@kernel
def learn(swa: int, porta: int, mac: int, now: int, fixed: int) -> bool:
    """An address has been seen at a port. False if it is the own address of another: then nothing is learned."""
    port = port_at(porta)
    sw = switch_at(swa)
    chosen = i64(-1)
    age = i64(-1)
    for k in range(TABLE_PROBES):
        entry = _entry(swa, mac, k)
        if entry["mac"] == mac and _alive(swa, entry, now):
            if entry["port"] == port["index"]:
                if now - entry["seen"] >= FRESH_NS:
                    entry["seen"] = now
                if fixed != 0:
                    entry["fixed"] = 1
                if sw["shards"] > 1 and entry["fixed"] == 0 and entry["stamp"] != load_acquire64(sw["common"]):
                    _restamp(swa, _place(swa, mac, k), porta, now)
                return True
            if entry["fixed"] != 0:
                return False
            chosen = i64(k)
            break
        older = _age(swa, porta, entry, now)
        if older > age:
            chosen, age = i64(k), older
    trunk = i64(_trunk_of(swa, mac))
    if trunk >= 0 and trunk != port["index"]:
        return False
    if chosen < 0:
        return True  # there is no room for it: it is flooded, which is slow and right
    entry = _entry(swa, mac, chosen)
    owner = _owner(swa, entry)
    if owner != 0:
        port_at(owner)["learned"][sw["shard"]] -= 1
    _write(swa, _place(swa, mac, chosen), porta, mac, now, fixed)
    port["learned"][sw["shard"]] += 1
    return True


@kernel
def _forget_others(swa: int, porta: int) -> None:
    """What was learned of others under a trunk's own address, in a VLAN of its, before it was there."""
    sw, port = switch_at(swa), port_at(porta)
    for k in range(1 << TABLE_BITS):
        at = sw["table"] + k * _SIZE
        entry = _entry_at(at)
        mac = i64(entry["mac"])
        if mac & (1 << VLAN_SHIFT) - 1 != port["mac"] or not has_vlan(porta, mac >> VLAN_SHIFT):
            continue
        owner = _owner(swa, entry)
        if owner != 0 and owner != porta:
            port_at(owner)["learned"][sw["shard"]] -= 1
            version = i64(entry["version"])
            store_release64(at, version + 1)
            # It is odd before anything of it changes. Pairs with the barrier in _read.
            full_barrier()
            entry["epoch"] = 0
            store_release64(at, version + 2)


@kernel
def join(swa: int, porta: int, now: int) -> None:
    """A port that is new to the worker: its own address is known from now on."""
    port = port_at(porta)
    if port["joined"][switch_at(swa)["shard"]] == 0:
        port["joined"][switch_at(swa)["shard"]] = 1
        if port["mac"] != 0:
            learn(swa, porta, port["mac"] | port["vlan"] << VLAN_SHIFT, now, 1)
            if port["trunk"] != 0:
                _forget_others(swa, porta)


@kernel
def welcome(swa: int, now: int) -> None:
    """The own addresses of all ports are known from now on, whether the worker has come round to them or not."""
    sw = switch_at(swa)
    for i in range(sw["top"]):
        porta = sw["ports"][i]
        if porta != 0:
            join(swa, porta, now)


@inline
def look_for_new(swa: int, now: int) -> None:
    """In a switch of several shards: ports that have joined since the worker looked last. Most have no ring here."""
    sw = switch_at(swa)
    joins = load_acquire64(sw["common"] + JOINS_AT)  # before the ports: who sees the count sees those
    if joins != sw["joins"]:
        sw["joins"] = joins
        welcome(swa, now)


@kernel
def find(swa: int, mac: int, now: int) -> int:
    """As lookup(); and when it is not known, those are asked that the worker has not come round to yet."""
    index = lookup(swa, mac, now)
    if index >= 0 or switch_at(swa)["shards"] > 1:
        return index
    welcome(swa, now)
    return lookup(swa, mac, now)
