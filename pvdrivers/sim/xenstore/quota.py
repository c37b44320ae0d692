"""What one guest may use of the store, and what it does use.

The limits, their names and their defaults are those of C xenstored 4.17 (xenstored_core.c, quota_*). dom0 has
none.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...xs_wire import REL_PATH_MAX


@dataclass(slots=True)
class Quotas:
    """Limits for each guest (`path_max` for dom0 too). A refused request gets the errno named."""

    nodes: int = 1000  # nodes owned; ENOSPC
    watches: int = 128  # E2BIG when there are more already (so one more than this fits, as in C xenstored)
    transactions: int = 10  # at once on a connection; ENOSPC, counted like watches
    node_size: int = 2048  # bytes of value, permissions, children's names and a 24-byte header; ENOSPC
    permissions: int = 5  # entries on a node; ENOSPC
    transaction_nodes: int = 1024  # nodes used in a transaction; ENOSPC, and the transaction cannot commit
    path_max: int = REL_PATH_MAX  # bytes of a path behind /local/domain/<domid>/; EINVAL
    outstanding: int = 20  # requests answered or events caused that nobody has read; then the guest waits
    memory: int = 2_621_440  # bytes of watches, transactions and unread output; ENOMEM, events are dropped
    dom0_output: int = 16_777_216  # bytes that a dom0 client may leave unread before it is disconnected

    # CONTROL quota: the wire's name, ours, and what `xenstore-control quota` prints.
    WIRE = (
        ("nodes", "nodes", "Nodes per domain"),
        ("watches", "watches", "Watches per domain"),
        ("transactions", "transactions", "Transactions per domain"),
        ("outstanding", "outstanding", "Outstanding requests per domain"),
        ("transaction-nodes", "transaction_nodes", "Max. number of accessed nodes per transaction"),
        ("memory", "memory", "Total Xenstore memory per domain (error level)"),
        ("node-size", "node_size", "Max. size of a node"),
        ("path-max", "path_max", "Max. length of a node path"),
        ("permissions", "permissions", "Max. number of permissions per node"),
    )


@dataclass(slots=True, eq=False)
class Domain:
    """A domain that the store serves, and what it uses. Nodes are counted by the tree, by owner."""

    domid: int
    domids: set[int] = field(default_factory=set)  # itself, and its target if it is a device model
    watches: int = 0
    transactions: int = 0
    outstanding: int = 0  # replies that were queued and not yet sent
    caused: int = 0  # events that its requests put in anybody's queue and that are not yet sent
    memory: int = 0
    waiting: bool = False  # a connection of it has stopped taking requests

    def __post_init__(self) -> None:
        self.domids.add(self.domid)

    def must_wait(self, quotas: Quotas) -> bool:
        """Whether no more requests of this guest are taken until somebody reads."""
        return (
            self.outstanding >= quotas.outstanding or self.caused >= quotas.outstanding or self.memory >= quotas.memory
        )
