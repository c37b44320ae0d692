"""The load generator's loop: fio's job in one kernel, on one queue, with no Python per request.

In verify mode every 512-byte sector carries a stamp: where it belongs, the generation of its block, the run, and
a pattern made from all three. The ledger knows of each block which generation its last write had, and a block has one
request in flight at a time: so what a read has to find is known exactly. An older generation is a lost or reordered
write, a mixture a torn one. A write may be followed by another to the same block as soon as it is done. Pages are
reused at once: one that was read is filled with poison and goes into the next request, so that data that comes late
lands where it is seen.
"""

from __future__ import annotations

import numpy as np

from pvdrivers.syscalls import clock_monotonic
from rings.atomics import load8, load32, load64, load_acquire64, pause, records, store8, store32, store64
from rings.blkif import OP_READ, OP_WRITE
from rings.jit import inline, kernel
from rings.ring import available

from .blkfront_kernels import arm, kick, reap, start, wait
from .blkfront_records import BATCH, COMPLETION, IO, QUEUE, STARTED

LOAD = np.dtype(
    [
        ("drain", "i8"),  # shared with Python: issue no more, end when nothing is in flight
        ("queue", "i8"),
        ("depth", "i8"),
        ("block_sectors", "i8"),
        ("first_sector", "i8"),  # of this queue's part of the disk
        ("blocks", "i8"),  # in it
        ("write_ppm", "i8"),  # how many of a million requests write
        ("random", "i8"),
        ("verify", "i8"),  # VERIFY_*
        ("again_ppm", "i8"),  # how many of a million completed writes are followed by one to the same block
        ("spin", "i8"),  # looks at the ring before sleeping
        ("salt", "i8"),  # 31 bits that tell this run's stamps from another's
        ("most", "i8"),  # requests to issue; 0: until told
        ("buffer", "i8"),  # pages of this load: slot_bytes for each slot
        ("slot_bytes", "i8"),
        ("frames", "i8"),  # i8[]: the frame of each page; 0: the buffer is no guest memory
        ("slots", "i8"),  # SLOT[depth]
        ("free", "i8"),  # i4 stack of free slots
        ("free_n", "i8"),
        ("generations", "i8"),  # i8[blocks]: of the last write; negative: unknown, as it failed; 0: never written
        ("busy", "i8"),  # u1[blocks]
        ("io", "i8"),  # scratch: an IO
        ("done", "i8"),  # scratch: COMPLETION[BATCH]
        ("random_state", "i8"),
        ("next_block", "i8"),
        ("issued", "i8"),
        ("completed", "i8"),
        ("errors", "i8"),
        ("first_error", "i8"),  # -errno
        ("first_error_sector", "i8"),
        ("verified", "i8"),  # blocks that were read and compared
        ("mismatches", "i8"),
        ("bad_sector", "i8"),  # of the first mismatch
        ("bad_word", "i8"),
        ("bad_expected", "i8"),  # generation
        ("bad_found_sector", "i8"),
        ("bad_found_generation", "i8"),
        ("spins_won", "i8"),
        ("sleeps", "i8"),
    ],
    align=True,
)

SLOT = np.dtype([("block", "i8"), ("op", "i8"), ("generation", "i8"), ("again", "i8")], align=True)

VERIFY_OFF, VERIFY_STAMPS, VERIFY_ALL = 0, 1, 2
"""Nothing; the first and last word group of each sector; every byte."""

# What run() says.
FINISHED = 0
SLICE = 1  # the time given is over: call again
STOPPED = 2  # the control thread wants the queue
VIOLATED = -1

_SLOT_SIZE, _COMPLETION_SIZE = SLOT.itemsize, COMPLETION.itemsize
_WORDS = 64  # of eight bytes in a sector
_POISON = 0x5AA55AA55AA55AA5
_LOW31 = 0x7FFFFFFF
_TRIES = 16  # to find a block with nothing in flight
_TICK_MS = 100


@inline
def pattern(sector: int, generation: int, salt: int) -> int:
    """31 bits of hash of what a sector has to hold. No product or sum leaves 63 bits, compiled or not."""
    h = (sector & _LOW31) * 0x1E3779B1 + (generation & _LOW31) * 0x05EBCA77 + salt * 0x02B2AE3D
    h &= _LOW31
    h ^= h >> 15
    h = (h * 0x2C1B3C6D) & _LOW31
    return h ^ (h >> 12)


@inline
def word(h: int, i: int) -> int:
    """Word `i` (3 to 63) of a sector with pattern `h`."""
    return (h << 31) ^ (i * 0x9E3779B97F4A7)


@kernel
def stamp(at: int, sectors: int, sector: int, generation: int, salt: int, whole: bool) -> None:
    """Write the stamps of `sectors` sectors, the first of which is `sector`; `whole`: and the pattern between."""
    for s in range(sectors):
        h = pattern(sector + s, generation, salt)
        p = at + (s << 9)
        store64(p, sector + s)
        store64(p + 8, generation)
        store64(p + 16, salt)
        if whole:
            for i in range(3, _WORDS - 1):
                store64(p + i * 8, word(h, i))
        store64(p + 504, word(h, 63))


@kernel
def first_bad(at: int, sectors: int, sector: int, generation: int, salt: int, whole: bool) -> int:
    """The first word (counted over all sectors) that is not what stamp() writes; -1: all is right."""
    for s in range(sectors):
        h = pattern(sector + s, generation, salt)
        p = at + (s << 9)
        bad = (load64(p) ^ (sector + s)) | (load64(p + 8) ^ generation) | (load64(p + 16) ^ salt)
        bad |= load64(p + 504) ^ word(h, 63)
        if whole:
            for i in range(3, _WORDS - 1):
                bad |= load64(p + i * 8) ^ word(h, i)
        if bad != 0:
            return s * _WORDS + _bad_word(p, h, sector + s, generation, salt, whole)
    return -1


@kernel
def _bad_word(p: int, h: int, sector: int, generation: int, salt: int, whole: bool) -> int:
    if load64(p) != sector:
        return 0
    if load64(p + 8) != generation:
        return 1
    if load64(p + 16) != salt:
        return 2
    if whole:
        for i in range(3, _WORDS - 1):
            if load64(p + i * 8) != word(h, i):
                return i
    return 63


@inline
def _draw(la: int) -> int:
    """31 random bits (xorshift32)."""
    load = records(la, 1, LOAD)[0]
    x = load["random_state"]
    x ^= (x << 13) & 0xFFFFFFFF
    x ^= x >> 17
    x ^= (x << 5) & 0xFFFFFFFF
    load["random_state"] = x
    return int(x >> 1)


@inline
def _chance(la: int, ppm: int) -> bool:
    if ppm <= 0:
        return False
    return ppm >= 1_000_000 or _draw(la) % 1_000_000 < ppm


@kernel
def _pick(la: int) -> int:
    """A block with nothing in flight, or -1 if none was found."""
    load = records(la, 1, LOAD)[0]
    for _ in range(_TRIES):
        if load["random"]:
            block = _draw(la) % load["blocks"]
        else:
            block = load["next_block"]
            if load8(load["busy"] + block) != 0:
                return -1  # in order means in order: wait for it
            load["next_block"] = block + 1 if block + 1 < load["blocks"] else 0
        if load8(load["busy"] + block) == 0:
            return int(block)
    return -1


@kernel
def _surface(la: int) -> bool:
    """Bring a free slot that is kept for a second write to the top of the stack; False if there is none."""
    load = records(la, 1, LOAD)[0]
    top = load["free"] + (load["free_n"] - 1) * 4
    for i in range(load["free_n"] - 1):
        number = load32(load["free"] + i * 4)
        if records(load["slots"] + int(number) * _SLOT_SIZE, 1, SLOT)[0]["again"] != 0:
            store32(load["free"] + i * 4, load32(top))
            store32(top, number)
            return True
    return False


@kernel
def _issue(la: int, now: int) -> int:
    """Start what there is room for; how many."""
    load = records(la, 1, LOAD)[0]
    io = records(load["io"], 1, IO)[0]
    issued = 0
    while load["free_n"] > 0 and (load["most"] == 0 or load["issued"] < load["most"]):
        number = int(load32(load["free"] + (load["free_n"] - 1) * 4))
        slot = records(load["slots"] + number * _SLOT_SIZE, 1, SLOT)[0]
        again = slot["again"] != 0
        if not again:
            block = _pick(la)
            if block < 0:
                if _surface(la):  # what is free may be kept for a block that only waits for its second write
                    continue
                break
            slot["block"] = block
            slot["op"] = OP_WRITE if _chance(la, load["write_ppm"]) else OP_READ
        block = slot["block"]
        sector = load["first_sector"] + block * load["block_sectors"]
        address = load["buffer"] + number * load["slot_bytes"]
        known = load64(load["generations"] + block * 8)
        slot["generation"] = known
        if slot["op"] == OP_WRITE:
            slot["generation"] = (known if known > 0 else -known) + 1
            if load["verify"] != VERIFY_OFF:
                stamp(address, load["block_sectors"], sector, slot["generation"], load["salt"],
                      load["verify"] == VERIFY_ALL)  # fmt: skip
        io["op"] = slot["op"]
        io["flags"] = 0
        io["sector"] = sector
        io["sectors"] = load["block_sectors"]
        io["address"] = address
        io["frames"] = 0
        if load["frames"] != 0:
            io["frames"] = load["frames"] + (number * load["slot_bytes"] >> 12) * 8
        io["tag"] = -1 - number
        if start(load["queue"], load["io"], now) != STARTED:
            if not again and load["random"] == 0:
                load["next_block"] = block
            break
        slot["again"] = 0
        load["free_n"] -= 1
        store8(load["busy"] + block, np.uint8(1))
        load["issued"] += 1
        issued += 1
    return issued


@kernel
def _compare(la: int, number: int) -> None:
    """What was read against what the ledger says; then the page is poisoned."""
    load = records(la, 1, LOAD)[0]
    slot = records(load["slots"] + number * _SLOT_SIZE, 1, SLOT)[0]
    address = load["buffer"] + number * load["slot_bytes"]
    sector = load["first_sector"] + slot["block"] * load["block_sectors"]
    if slot["generation"] > 0:
        load["verified"] += 1
        bad = first_bad(address, load["block_sectors"], sector, slot["generation"], load["salt"],
                        load["verify"] == VERIFY_ALL)  # fmt: skip
        if bad >= 0:
            if load["mismatches"] == 0:
                at = address + ((bad >> 6) << 9)
                load["bad_sector"] = sector + (bad >> 6)
                load["bad_word"] = bad & 63
                load["bad_expected"] = slot["generation"]
                load["bad_found_sector"] = load64(at)
                load["bad_found_generation"] = load64(at + 8)
            load["mismatches"] += 1
    for i in range(load["block_sectors"] * _WORDS):
        store64(address + i * 8, _POISON)


@kernel
def _finish(la: int, number: int, status: int) -> None:
    """A request of ours is done."""
    load = records(la, 1, LOAD)[0]
    slot = records(load["slots"] + number * _SLOT_SIZE, 1, SLOT)[0]
    block = slot["block"]
    store8(load["busy"] + block, np.uint8(0))
    store32(load["free"] + load["free_n"] * 4, np.uint32(number))
    load["free_n"] += 1
    load["completed"] += 1
    if status != 0:
        if load["errors"] == 0:
            load["first_error"] = status
            load["first_error_sector"] = load["first_sector"] + block * load["block_sectors"]
        load["errors"] += 1
    if slot["op"] == OP_WRITE:
        # A write that failed has been done, or in part, or not: nothing is expected of the block any more.
        store64(load["generations"] + block * 8, slot["generation"] if status == 0 else -slot["generation"])
        if status == 0 and load["drain"] == 0 and _chance(la, load["again_ppm"]):
            slot["again"] = 1  # the slot is on top of the stack: this is what it is used for next
            slot["op"] = OP_WRITE
            store8(load["busy"] + block, np.uint8(1))
    elif status == 0 and load["verify"] != VERIFY_OFF:
        _compare(la, number)


@kernel
def _forget_again(la: int) -> None:
    """Draining: blocks kept for a second write are free."""
    load = records(la, 1, LOAD)[0]
    for i in range(load["free_n"]):
        number = int(load32(load["free"] + i * 4))
        slot = records(load["slots"] + number * _SLOT_SIZE, 1, SLOT)[0]
        if slot["again"] != 0:
            slot["again"] = 0
            store8(load["busy"] + slot["block"], np.uint8(0))


@kernel
def run(la: int, until: int) -> int:
    """Work until CLOCK_MONOTONIC is `until` ns, or all is done: FINISHED, SLICE, STOPPED or VIOLATED."""
    load = records(la, 1, LOAD)[0]
    queue = load["queue"]
    end = records(queue, 1, QUEUE)[0]["end"]
    while True:
        now = clock_monotonic()
        if load_acquire64(queue) != 0:  # QUEUE.stop, the first field
            return STOPPED
        draining = load_acquire64(la) != 0  # LOAD.drain, the first field
        if draining:
            _forget_again(la)
        elif _issue(la, now) > 0:
            kick(queue)
        n = reap(queue, load["done"], np.int64(BATCH), now)  # a literal would compile another one
        if n < 0:
            return VIOLATED
        for i in range(n):
            done = records(load["done"] + i * _COMPLETION_SIZE, 1, COMPLETION)[0]
            _finish(la, -1 - done["tag"], done["status"])
        if n == 0:
            if load["free_n"] == load["depth"]:
                if draining or (load["most"] > 0 and load["issued"] >= load["most"]):
                    return FINISHED
            for _ in range(load["spin"]):
                if available(end) != 0:
                    load["spins_won"] += 1
                    break
                pause()
            else:
                n = arm(queue)
                if n < 0:
                    return VIOLATED
                if n == 0:
                    load["sleeps"] += 1
                    if wait(queue, np.int64(_TICK_MS)) < 0:
                        return SLICE  # a signal: Python's handlers run
        if now >= until:
            return SLICE


ARGUMENTS = {
    "run": "(int64, int64)",
    "stamp": "(int64, int64, int64, int64, int64, boolean)",
    "first_bad": "(int64, int64, int64, int64, int64, boolean)",
}
"""What Python calls, and with what, for warm()."""
