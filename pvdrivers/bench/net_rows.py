"""What `pvdrivers bench net` measures: each kind of traffic, where it may run, what it is measured beside."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ROWS", "Figure", "NetWork", "Traffic"]

SMALL_SET, LARGE_SET = 2 << 20, 64 << 20
GSO = 65_000
_SEGMENT = 1448


@dataclass(frozen=True)
class Traffic:
    """A load of ours. `how`:

    one, both   from guest A to guest B, or each to the other, by the switch; one process drives both
    apart       from A to B, a process for each
    null, tap   from A to nobody; to a TAP of this host that throws away what comes
    pairs       as `one`, by `pairs` queues of each guest and as many workers of one switch; a core each for a worker
                with the load of a queue of both guests
    iperf       iperf3 between two network namespaces: in one a TAP of a guest's netfront, in the other one of netback's

    `rate`: bytes a second that the first guest's vif is limited to, in each direction; 0: to none. `staging`: the
    guests have their pages kept mapped, as our netfront does, where all of the working set may be (2 MiB); without it
    each packet is copied by grefs, as from Linux's netfront.
    """

    how: str = "one"
    size: int = 64
    queues: int = 1
    working_set: int = SMALL_SET
    look: str = "sample"
    one_at_a_time: bool = False
    pairs: int = 1
    rate: int = 0
    staging: bool = True

    @property
    def gso_size(self) -> int:
        return _SEGMENT if self.size > 4096 else 0

    @property
    def slots(self) -> int:
        """Of each packet, on a ring."""
        return -(-self.size // 4096) + (1 if self.gso_size else 0)

    @property
    def where(self) -> str:
        """In words."""
        if self.how == "iperf":
            return "anywhere"
        if self.how == "pairs":
            return f"one switch of {self.pairs} worker(s), each with the load of a pair of queues on one core"
        if self.how == "apart":
            return "switch on a core, both guests' processes on the other"
        return "switch on a core, one load for all guests on the other, spinning"


@dataclass(frozen=True)
class Figure:
    """One row: figure `key` of the runs of ours beside those of the peer of this name ("": a limit of its own)."""

    what: str
    beside: str = ""
    key: str = "rate"
    unit: str = "/s"
    target: float | None = None
    sense: str = ">="
    scale: float = 1.0


@dataclass(frozen=True)
class NetWork:
    """Runs of ours and of peers in turns, and the rows that are made of them.

    `peers`: name -> what it is: "testpmd", "memcpy", "veth" (of the same size and working set), "spliced" (see
    peers/iperf.py), "asked" (the rate that was set), or traffic of ours. `note`: what stands in each row.
    """

    key: str
    ours: Traffic
    rows: tuple[Figure, ...]
    peers: dict[str, str | Traffic] = field(default_factory=dict)
    note: str = ""


TESTPMD = "DPDK testpmd, vhost-user switch"
MEMCPY = "memcpy of the same bytes"
VETH = "veth, iperf3 TCP"
SPLICED = "two TAPs spliced by a bare loop in C"
ASKED = "what was asked"
_LIMIT = 125_000_000
_TOGETHER = "one process that drives both"


def _bytes(what: str, beside: str = "", target: float | None = None) -> Figure:
    return Figure(what, beside, "bytes_per_second", "B/s", target)


def _pages(staging: bool) -> str:
    return "pages kept mapped" if staging else "copied by grefs"


def _both(key: str, size: int, target: float, staging: bool = True) -> NetWork:
    what = f"A and B to each other by the switch, {size}-byte packets, 1 queue each, {_pages(staging)}"
    return NetWork(
        key, Traffic("both", size, staging=staging),
        (Figure(what, TESTPMD, target=target),
         Figure(f"{what}: CPU of the switch a packet", TESTPMD, "switch_ns", "ns", 1.0, "<=")),
        {TESTPMD: "testpmd"},
    )  # fmt: skip


def _gso(key: str, working_set: int, staging: bool = True) -> NetWork:
    text = f"working set {working_set >> 20} MiB, {_pages(staging)}"
    return NetWork(
        key, Traffic("one", GSO, working_set=working_set, staging=staging),
        (_bytes(f"A to B by the switch, {GSO} bytes (GSO), {text}", MEMCPY, 0.7),),
        {MEMCPY: "memcpy"},
    )  # fmt: skip


def _apart(size: int) -> NetWork:
    what = f"A to B by the switch, {size} bytes, a process for each guest"
    figure = Figure(what, _TOGETHER) if size <= 4096 else _bytes(what, _TOGETHER)
    return NetWork(f"apart{size}", Traffic("apart", size), (figure,), {_TOGETHER: Traffic("one", size)})


def _limit() -> NetWork:
    what = f"limit of a whole vif, {_LIMIT * 8e-9:g} Gbit/s, 4 queues, both directions at once"
    return NetWork(
        "limit", Traffic("both", 1500, queues=4, rate=_LIMIT),
        (Figure(f"{what}: from the guest", ASKED, "path0", "B/s", 0.02, "within"),
         Figure(f"{what}: to the guest", ASKED, "path1", "B/s", 0.02, "within")),
        {ASKED: "asked"},
    )  # fmt: skip


def _spliced() -> NetWork:
    what = "iperf3 TCP between two namespaces, GSO, guest to TAP"
    back = "iperf3 TCP between two namespaces, GSO, TAP to guest"
    return NetWork(
        "splice", Traffic("iperf", GSO),
        (_bytes(what, SPLICED, 0.9), Figure(back, SPLICED, "back", "B/s"),
         _bytes(what, VETH), Figure(back, VETH, "back", "B/s")),
        {SPLICED: "spliced", VETH: "veth"},
        "ours: TAP of a guest's netfront in one namespace, its vif's TAP (tap:) in the other",
    )  # fmt: skip


_ONE_PAIR = "one pair on one core"
ROWS = (
    _both("net64", 64, 1.5),
    _both("net64-grefs", 64, 1.5, staging=False),
    _both("net1500", 1500, 1.7),
    _both("net1500-grefs", 1500, 1.7, staging=False),
    _gso("gso2", SMALL_SET),
    _gso("gso2-grefs", SMALL_SET, staging=False),
    _gso("gso64", LARGE_SET, staging=False),
    NetWork(
        "gso-read", Traffic("one", GSO, look="all"),
        (Figure(f"A to B, {GSO} bytes (GSO), B reads and checks every byte, working set 2 MiB", key="bytes_per_second",
                unit="Gbit/s", target=48.0, scale=8e-9),),
    ),
    NetWork("veth", Traffic("one", GSO), (_bytes(f"A to B, {GSO} bytes (GSO)", VETH),), {VETH: "veth"}),
    *(_apart(size) for size in (64, 1500, GSO)),
    NetWork(
        "pairs", Traffic("pairs", 1500, pairs=2),
        (Figure("two pairs of queues on two cores, 1500 bytes, all of a pair on one core", _ONE_PAIR, target=1.6),),
        {_ONE_PAIR: Traffic("pairs", 1500)},
    ),
    _limit(),
    _spliced(),
)  # fmt: skip
