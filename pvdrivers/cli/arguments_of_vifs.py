"""The verbs that attach and detach network interfaces, with xl's words."""

from __future__ import annotations

import argparse

from .options import Verbs, connect_option, detach_options, domain_argument, new_verb, run_dir_option, timeout_option

_VIF = """
VIF is what xl calls a network device (xl-network-configuration(5)): name=value, separated by commas or one by one.

    pvdrivers network-attach web bridge=switch:lan
    pvdrivers network-attach 5 mac=00:16:3e:12:34:56 bridge=switch:lan rate=100Mb/s mtu=9000

type=vif, mac=, bridge=, ip=, script=, rate=RATE[@INTERVAL], mtu=, backend=DOMAIN, vifname=, gatewaydev=, devid=,
trusted and untrusted are xl's. Without mac= one of 00:16:3e is made; without bridge= it is on the switch `pvdrivers`.
bridge= is a port as docs/network.md lists them. No script is run: script=vif-bridge says what bridge= does. Ours:

    queues=         1 to 16: the most queues that the guest is offered
"""


def _attach(verbs: Verbs) -> None:
    verb = new_verb(verbs, "network-attach", "give a domain a network interface, served by `pvdrivers serve`")
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = _VIF
    run_dir_option(verb)
    domain_argument(verb)
    verb.add_argument("vif", metavar="VIF", nargs="*", help="what it is to get, see below")
    verb.add_argument(
        "--class",
        dest="kind",
        choices=("vif", "pvnet"),
        default="vif",
        help="kind of backend: vif where the kernel does not serve it, or pvnet beside it (default: %(default)s)",
    )
    connect_option(verb)
    timeout_option(verb)


def _detach(verbs: Verbs) -> None:
    verb = new_verb(verbs, "network-detach", "take a network interface from a domain that network-attach gave it")
    run_dir_option(verb)
    domain_argument(verb)
    verb.add_argument("vif", metavar="DEVID|MAC", help="its number, or its address")
    detach_options(verb, "what it sends from then on is lost")


def _list(verbs: Verbs) -> None:
    verb = new_verb(verbs, "network-list", "list the network interfaces of a domain, whoever serves them")
    run_dir_option(verb)
    domain_argument(verb)


VERBS = (_attach, _detach, _list)
