"""Which address is behind which port. Pure kernels over the table of a switch; only its worker calls them.

A port's own address - what the toolstack has given the vif - is fixed: nobody else can be learned under it. All others
are learned from what is sent, may move from port to port as guests within guests do, and are forgotten after AGE_NS.
A full neighbourhood of the table gives up what was seen longest ago. A `mac` here has its VLAN above the six bytes.
"""

from __future__ import annotations

from typing import Any

from rings.atomics import i64, records
from rings.jit import inline, kernel

from .records import (
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

AGE_NS = 300_000_000_000
"""As long as Linux's bridge keeps an address."""
_SIZE = TABLE_ENTRY.itemsize
_MASK = (1 << TABLE_BITS) - 1


@inline
def _entry(swa: int, mac: int, probe: int) -> Any:
    hash = (((mac ^ mac >> 17 ^ mac >> VLAN_SHIFT) & 0x7FFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF) >> (32 - TABLE_BITS)
    return records(switch_at(swa)["table"] + ((hash + probe) & _MASK) * _SIZE, 1, TABLE_ENTRY)[0]


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
def lookup(swa: int, mac: int, now: int) -> int:
    """The index of the port that an address is behind, -1 if it is not known."""
    for k in range(TABLE_PROBES):
        entry = _entry(swa, mac, k)
        if entry["mac"] == mac and _alive(swa, entry, now):
            return i64(entry["port"])
    return i64(-1)


@inline
def _age(swa: int, porta: int, entry: Any, now: int) -> int:
    """How readily an entry is given up: ns since it was seen, -1 never. A port that has many gives up its own."""
    owner = _owner(swa, entry)
    most = MAX_LEARNED if port_at(porta)["kind"] <= PORT_VIF else MAX_LEARNED_OUTSIDE
    if owner != porta and port_at(porta)["learned"] >= most:
        return i64(-1)
    if owner == 0:
        return i64(1) << 62
    return i64(-1) if entry["fixed"] != 0 else now - entry["seen"]


@kernel
def learn(swa: int, porta: int, mac: int, now: int, fixed: int) -> bool:
    """An address has been seen at a port. False if it is the own address of another: then nothing is learned."""
    port = port_at(porta)
    chosen = i64(-1)
    age = i64(-1)
    for k in range(TABLE_PROBES):
        entry = _entry(swa, mac, k)
        if entry["mac"] == mac and _alive(swa, entry, now):
            if entry["port"] == port["index"]:
                entry["seen"] = now
                entry["fixed"] |= fixed
                return True
            if entry["fixed"] != 0:
                return False
            chosen = i64(k)
            break
        older = _age(swa, porta, entry, now)
        if older > age:
            chosen, age = i64(k), older
    if chosen < 0:
        return True  # there is no room for it: it is flooded, which is slow and right
    entry = _entry(swa, mac, chosen)
    owner = _owner(swa, entry)
    if owner != 0:
        port_at(owner)["learned"] -= 1
    entry["mac"], entry["port"], entry["epoch"] = mac, port["index"], port["epoch"]
    entry["seen"], entry["fixed"] = now, fixed
    port["learned"] += 1
    return True


@kernel
def join(swa: int, porta: int, now: int) -> None:
    """A port that is new to the worker: its own address is known from now on."""
    port = port_at(porta)
    if port["joined"] == 0:
        port["joined"] = 1
        if port["mac"] != 0:
            learn(swa, porta, port["mac"] | port["vlan"] << VLAN_SHIFT, now, 1)


@kernel
def find(swa: int, mac: int, now: int) -> int:
    """As lookup(); and when it is not known, those are asked that the worker has not come round to yet."""
    index = lookup(swa, mac, now)
    if index >= 0:
        return index
    sw = switch_at(swa)
    for i in range(sw["top"]):
        porta = sw["ports"][i]
        if porta != 0 and port_at(porta)["joined"] == 0:
            join(swa, porta, now)
    return lookup(swa, mac, now)
