"""A switch of several workers: what one of them does for the others.

Each worker has a shard of the switch, with a table, packets and memory of its own, and serves the queues that lie in
it; the shards are fully meshed by links (see `link`), with split horizon: a packet goes from the shard where it came in
straight to each that has a receiver's queue, and from there to no other. So nothing on a packet's path is locked.

Which queue of a receiver it takes is the same asked here or there (`hashing`, choose_queue), and one of the sender's
own shard if the receiver has any there: two guests with a queue in each shard never need a link.
"""

from __future__ import annotations

from pvdrivers.worker.marks import stats_at
from rings.atomics import i64
from rings.jit import inline, kernel

from .deliver import gather_kept
from .link import put, send
from .records import N_LINK, packet_at, switch_at


@kernel
def cross(wa: int, swa: int, pa: int, stats: int) -> None:
    """Put a packet on the links to PACKET.links; its bytes are there after the flush. What finds no room is lost, and
    counted at its sender."""
    sw, packet = switch_at(swa), packet_at(pa)
    for t in range(sw["shards"]):
        if packet["links"] >> t & 1 == 0:
            continue
        there = i64(put(sw["links"][t], pa))
        if there == 0:
            stats_at(stats)["kinds"][N_LINK] += 1
        elif packet["have"] < packet["size"]:
            gather_kept(wa, swa, pa, there, i64(0), stats)


@inline
def send_links(swa: int) -> None:
    """Have the other shards see what was put."""
    sw = switch_at(swa)
    for t in range(sw["shards"]):
        if sw["links"][t] != 0:
            send(sw["links"][t])
