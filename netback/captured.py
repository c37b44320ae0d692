"""What a capture of a vif gets: packets that its guest has sent, as they were when they were fetched, and those that
were put on its rx rings. One load and one branch a packet where no capture runs: PORT.capture is 0."""

from __future__ import annotations

from pvdrivers.capture_ring import RECORD, capture_at, put_record, take_room
from pvdrivers.worker.marks import ring_at, worker_at
from rings.atomics import i64, records
from rings.jit import kernel

from .records import packet_at, port_at
from .waiting import rx_queue_at


@kernel
def _capture(wa: int, porta: int, ra: int, pa: int, outbound: int) -> None:
    port, packet = port_at(porta), packet_at(pa)
    ca = port["capture"]
    if ca == 0:
        return  # it has ended since somebody looked
    queue = rx_queue_at(ring_at(ra)["priv"])["index"]
    length = min(packet["have"], capture_at(ca)["snap"])
    at = take_room(ca, queue, length)
    if at == 0:
        return
    record = records(at, 1, RECORD)[0]
    record["size"], record["time"] = packet["size"], worker_at(wa)["now"]
    record["queue"], record["outbound"], record["csum"] = queue, outbound, packet["csum"]
    record["gso_size"], record["gso_type"] = packet["gso_size"], packet["gso_type"]
    put_record(ca, at, packet["data"], length)


@kernel
def capture_sent(wa: int, ra: int, pa: int) -> None:
    """A packet of the guest behind tx ring `ra`: all of its bytes are private."""
    if packet_at(pa)["verdict"] == 0 and packet_at(pa)["status"] == 0:
        _capture(wa, ring_at(ra)["device"], ra, pa, i64(1))


@kernel
def capture_received(wa: int, ra: int, pa: int) -> None:
    """A packet that was put on rx ring `ra`, now or after it had waited: its private bytes."""
    _capture(wa, ring_at(ra)["device"], ra, pa, i64(0))
