"""The verbs that attach and detach disks, with xl's words."""

from __future__ import annotations

import argparse

from .options import Verbs, connect_option, detach_options, domain_argument, new_verb, run_dir_option, timeout_option

_DISK = """
DISK is what xl calls a disc specification (xl-disk-configuration(5)): target, format, vdev and access in this order, or
by name, separated by commas or given one by one; and flags. target= comes last and may have commas in it.

    pvdrivers block-attach web /dev/vg/web-data,raw,xvdb,rw
    pvdrivers block-attach 5 vdev=xvdc access=ro target=/srv/images/data.img
    pvdrivers block-attach 5 memory:64M,,xvdd,w,policy=copy

format is raw; access is rw, r, or w! for a disk that others write, too; cdrom, no-discard, removable, direct-io-safe,
untrusted and backend=DOMAIN are xl's. Options of ours:
"""


def _attach(verbs: Verbs) -> None:
    verb = new_verb(verbs, "block-attach", "give a domain a disk, served by `pvdrivers serve`")
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = _DISK + _our_options()
    run_dir_option(verb)
    domain_argument(verb)
    verb.add_argument("disk", metavar="DISK", nargs="+", help="what it is to get, see below")
    verb.add_argument(
        "--class",
        dest="kind",
        choices=("pvblk", "vbd"),
        default="pvblk",
        help="kind of backend; vbd only where the kernel does not serve it (default: %(default)s)",
    )
    connect_option(verb)
    timeout_option(verb)


def _our_options() -> str:
    from pvdrivers.storage.uri import OPTIONS

    lines = []
    for name, option in OPTIONS.items():
        if name not in ("mode", "cdrom", "vdev", "removable", "discard"):
            lines.append(f"    {name + '=':16}{option.allowed}: {option.help}")
    return "\n" + "\n".join(lines)


def _detach(verbs: Verbs) -> None:
    verb = new_verb(verbs, "block-detach", "take a disk from a domain that block-attach gave it")
    run_dir_option(verb)
    domain_argument(verb)
    verb.add_argument("vdev", metavar="VDEV", help="its name, such as xvdb, or number")
    detach_options(verb, "what it asks of the disk from then on gets no answer, and its programs may hang")


def _list(verbs: Verbs) -> None:
    verb = new_verb(verbs, "block-list", "list the disks of a domain, whoever serves them")
    run_dir_option(verb)
    domain_argument(verb)


VERBS = (_attach, _detach, _list)
