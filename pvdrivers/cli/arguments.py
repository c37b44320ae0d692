"""Every verb and option of the command line, in one light file, so that help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from pvdrivers import __version__

from . import arguments_of_disks as disks
from . import arguments_of_vifs as vifs
from .options import Verbs, domid, natural, new_verb, positive, run_dir_option, switch, unix_address


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``args.verb`` names the module that does the work."""
    top = argparse.ArgumentParser(
        prog="pvdrivers",
        description="Xen PV drivers in userspace: backends, frontends and an embedded simulated Xen.",
        epilog="'pvdrivers VERB --help' tells the options of a verb.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"pvdrivers {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    ours = (_sim, _serve, _guest, _demo, _bench, _stats, _capture, _warm, _check, _upgrade)
    for declare in (*ours, *disks.VERBS, *vifs.VERBS):
        declare(verbs)
    return top


def _sim(verbs: Verbs) -> None:
    verb = new_verb(verbs, "sim", "run the embedded Xen in the foreground; DIR/xenstored is its store's socket")
    run_dir_option(verb)
    verb.add_argument("--memory", type=positive, metavar="MIB", help="memory for all domains together")


def _serve(verbs: Verbs) -> None:
    verb = new_verb(verbs, "serve", "run the backends in the foreground")
    run_dir_option(verb)
    verb.add_argument(
        "--domain",
        dest="domains",
        type=domid,
        nargs="+",
        action="extend",
        metavar="N",
        help="serve only these guests (default: all)",
    )
    verb.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="serve only these device classes: vbd (the kernel's kind), pvblk (ours, by block-attach), qdisk (QEMU's),"
        " vif (networks: the kernel's kind), pvnet (ours, by network-attach); default: vbd and pvblk",
    )
    verb.add_argument(
        "--io",
        choices=("auto", "threads"),
        default="auto",
        help="auto: io_uring, or threads where that is refused; threads: always",
    )
    verb.add_argument(
        "--workers", type=positive, metavar="N", help="data-plane threads (default: chosen from the cores)"
    )
    verb.add_argument(
        "--spin", type=natural, metavar="US", help="microseconds to poll before sleeping; 0 sleeps at once"
    )
    verb.add_argument(
        "--grant-pages",
        type=natural,
        metavar="N",
        help="pages of guests mapped at once, beyond which they are copied (default: what this host allows, shared with"
        " others on the same run directory; no limit on the embedded Xen)",
    )
    verb.add_argument(
        "--grant-pages-per-domain",
        type=natural,
        metavar="N",
        help="the same for the disks of one guest (default: half of that)",
    )
    verb.add_argument(
        "--uplink",
        dest="uplinks",
        action="append",
        default=[],
        metavar="SWITCH=PORT",
        help="a port of a switch of vifs that leads out: tap:NAME, a bridge of Linux, or packet:INTERFACE, with options"
        " behind commas (docs/network.md); may be repeated",
    )
    verb.add_argument(
        "--coalesce",
        type=natural,
        metavar="US",
        help="microseconds that requests of a guest with a deep queue may wait for each other, which saves wake-ups;"
        " 0: never (default: 200 on Xen, 0 on the embedded one, where a wake-up costs little)",
    )
    verb.add_argument(
        "--no-journal",
        dest="journal",
        action="store_false",
        help="keep no journal: requests under way are lost when this process dies",
    )
    verb.add_argument(
        "--strict",
        action="store_true",
        help="map only what is granted at the moment, so that a use after unmap faults",
    )


def _guest(verbs: Verbs) -> None:
    verb = new_verb(verbs, "guest", "act as the toolstack, then be a guest with blkfront and netfront")
    run_dir_option(verb)
    verb.add_argument(
        "--net",
        dest="nets",
        action="append",
        default=[],
        metavar="BRIDGE[,KEY=VALUE...]",
        help="attach a vif: switch:NAME or null:, and mac=, mtu=, queues=, hash=on, csum=0, gso=0, sg=0 for what it"
        " does not take; with tap=NAME there is a TAP behind it, in the network namespace that this runs in; may be"
        " repeated",
    )
    verb.add_argument(
        "--disk",
        dest="disks",
        action="append",
        default=[],
        metavar="URI[,KEY=VALUE...]",
        help="attach a disk: a path, null:, memory:, nbd+unix://, nbd://; may be repeated",
    )
    verb.add_argument(
        "--nbd", metavar="unix:PATH", type=unix_address, help="serve what blkfront sees to any NBD client"
    )
    verb.add_argument(
        "--queues",
        type=positive,
        metavar="N",
        help="hardware queues (default: one a vCPU, as many as the backend allows)",
    )
    verb.add_argument(
        "--ring-order",
        type=int,
        choices=range(5),
        metavar="N",
        help="2**N pages a ring, N from 0 to 4 (default: as many as the backend allows)",
    )
    verb.add_argument(
        "--abi",
        choices=("x86_64", "x86_32"),
        default="x86_64",
        help="layout of the requests (default: %(default)s)",
    )
    verb.add_argument(
        "--persistent",
        type=switch,
        default=True,
        metavar="on|off",
        help="use persistent grants where the backend offers them (default: on)",
    )
    verb.add_argument(
        "--indirect",
        type=natural,
        metavar="N",
        help="most segments in an indirect request; 0 sends none (default: the backend's)",
    )
    verb.add_argument(
        "--untrusted-backend",
        action="store_true",
        help="do not trust the backend (trusted=0): bounce all data through pages of our own",
    )
    verb.add_argument(
        "--memory",
        type=positive,
        default=256,
        metavar="MIB",
        help="the guest's memory (default: %(default)s)",
    )


def _demo(verbs: Verbs) -> None:
    verb = new_verb(verbs, "demo", "a guest's disk, and two guests that talk by TCP; every byte is verified")
    verb.add_argument(
        "--disk",
        type=Path,
        metavar="PATH",
        help="use this image, made if it is not there (default: one of the demo's own)",
    )
    verb.add_argument(
        "--overwrite", action="store_true", help="what is on the disk may be lost; without it, it has to be empty"
    )
    verb.add_argument(
        "--kill", action="store_true", help="kill the backend under load and start it again: nothing is to be noticed"
    )
    verb.add_argument("--size", type=positive, metavar="MIB", help="size of the image made on the spot")
    verb.add_argument("--seconds", type=positive, metavar="N", help="how long the load runs")
    verb.add_argument("--quick", action="store_true", help="a few seconds in all")


def _bench(verbs: Verbs) -> None:
    verb = new_verb(verbs, "bench", "measure, side by side with a peer that does the same work")
    verb.add_argument("what", choices=("ring", "blk", "net", "xenstore", "fairness", "daemon", "all"))
    form = verb.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document on standard output, with every single run")
    form.add_argument("--markdown", action="store_true", help="the table of docs/benchmarks.md")
    verb.add_argument("--quick", action="store_true", help="fewer and shorter rounds, so wider intervals")
    verb.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where the file for direct I/O is made, 1 GiB, removed afterwards (default: $TMPDIR, or /var/tmp)",
    )
    verb.add_argument("--rows", nargs="+", metavar="KEY", help="blk, net: only these, by the keys that --json shows")


def _stats(verbs: Verbs) -> None:
    verb = new_verb(verbs, "stats", "what the backends on this run directory have done, per disk and queue")
    run_dir_option(verb)
    verb.add_argument("--json", action="store_true", help="one JSON document on standard output")
    verb.add_argument("--inflight", action="store_true", help="list the requests under way, and for how long")


def _capture(verbs: Verbs) -> None:
    verb = new_verb(verbs, "capture", "write the packets of a vif to a pcapng file, for Wireshark or tcpdump")
    verb.add_argument("vif", metavar="VIF", help="vif-DOMID-DEVID, or pvnet-, as `pvdrivers stats` has it")
    verb.add_argument("out", metavar="FILE", help="the file; - is standard output")
    run_dir_option(verb)
    verb.add_argument("--seconds", type=positive, metavar="N", help="end after so long (default: at SIGINT)")
    verb.add_argument("--packets", type=positive, metavar="N", help="end after so many")
    verb.add_argument(
        "--snaplen", type=positive, default=1 << 17, metavar="BYTES", help="most bytes of a packet (default: all of it)"
    )
    verb.add_argument(
        "--buffer",
        type=positive,
        default=16,
        metavar="MIB",
        help="memory for packets that are not written yet; what finds no room is counted (default: %(default)s)",
    )


def _upgrade(verbs: Verbs) -> None:
    verb = new_verb(verbs, "upgrade", "have newly started daemons take over from the running ones, under I/O")
    run_dir_option(verb)
    verb.add_argument("--pid", type=positive, metavar="PID", help="only this daemon (default: all that run there)")
    verb.add_argument(
        "--timeout",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long a new one may compile; then the old one stays (default: %(default)s)",
    )
    verb.add_argument(
        "--force",
        action="store_true",
        help="even to a version that cannot read the journals: requests are finished, every disk is closed, and guests"
        " that can will connect anew; a Linux guest loses a disk that it has open",
    )


def _warm(verbs: Verbs) -> None:
    verb = new_verb(verbs, "warm", "compile all kernels now, so that nothing is compiled later")
    verb.add_argument("--unless-under-way", action="store_true", help="leave it to another process that does it now")


def _check(verbs: Verbs) -> None:
    new_verb(verbs, "check", "tell what this host has and lacks, and what to do about it")
