"""``pvdrivers network-attach``, ``network-detach`` and ``network-list``, with a daemon and guests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pvdrivers.sim import toolstack
from tests.restart.bed import Bed, until
from tests.service.conftest import cli
from tests.service.verbs import Guest, fails

MAC, OTHER = "00:16:3e:00:00:0a", "00:16:3e:00:00:0b"


@pytest.fixture(scope="module")
def net() -> Iterator[Bed]:
    with TemporaryDirectory(dir="/dev/shm", prefix="pv-service-") as top:
        with Bed(Path(top) / "run", "--class", "vif") as bed:
            bed.serve()
            yield bed
            assert "our own fault" not in bed.log.read_text(), bed.log.read_text()


@pytest.fixture
def guests(net: Bed, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Guest]]:
    with ExitStack() as stack:
        yield lambda name: Guest(net, stack, f"{name}-{request.node.name}")


@pytest.fixture
def guest(guests: Callable[[str], Guest]) -> Guest:
    return guests("web")


def columns(net: Bed, guest: Guest) -> list[list[str]]:
    """The table without its heading, in words."""
    lines = cli(net, "network-list", guest.name).stdout.splitlines()
    assert lines[0].split() == ["Idx", "BE", "Mac", "Addr.", "handle", "state", "evt-ch", "tx-/rx-ring-ref", "BE-path",
                                "backend", "queues", "bridge"]  # fmt: skip
    return [line.split() for line in lines[1:]]


def test_a_vif_comes_is_used_and_goes(net: Bed, guests: Callable[[str], Guest]) -> None:
    a, b = guests("a"), guests("b")
    for guest, mac in ((a, MAC), (b, OTHER)):
        done = cli(net, "network-attach", guest.name, f"mac={mac},bridge=switch:lan", "queues=2")
        assert (done.returncode, done.stderr) == (0, "")
        said = f"vif 0 ({mac}): attached to domain {guest.domid}, InitWait; the guest has not connected yet\n"
        assert done.stdout == said
    one, two = a.vif(0), b.vif(0)
    frame = two.mac + one.mac + b"\x88\xb5hello"
    one.send(frame)
    assert two.receive(5) == frame
    (words,) = columns(net, a)
    assert words[:5] == ["0", "0", MAC, "0", "4"]
    assert re.fullmatch(r"[0-9]+/[0-9]+", words[6]) and words[5].isdigit()
    assert words[7:] == [f"/local/domain/0/backend/vif/{a.domid}/0", "Connected", "1", "switch:lan"]

    one.close()
    for guest, name in ((a, "0"), (b, OTHER.upper())):
        done = cli(net, "network-detach", guest.name, name)
        mac = MAC if guest is a else OTHER
        said = f"vif 0 ({mac}): detached from domain {guest.domid}\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
        assert columns(net, guest) == []
        assert net.dom0.store.ls(f"/local/domain/0/backend/vif/{guest.domid}") is None
        assert net.dom0.store.ls(f"/local/domain/{guest.domid}/device/vif/0") is None
    fails(cli(net, "network-detach", a.name, "0"), f"domain {a.domid} has no vif 0; it has: none")


def test_what_is_written_is_what_libxl_writes(net: Bed, guest: Guest) -> None:
    words = "type=vif,ip=10.0.0.2,rate=100Mb/s@20ms,mtu=9000,vifname=web0,script=vif-bridge,untrusted,gatewaydev=eth0"
    done = cli(net, "network-attach", guest.name, *words.split(","), "devid=3")
    assert done.returncode == 0, done.stderr
    mac = re.search(r"vif 3 \((00:16:3e:[0-7][0-9a-f](:[0-9a-f]{2}){2})\): attached", done.stdout)
    assert mac, done.stdout
    read = net.dom0.store.read
    back, front = f"/local/domain/0/backend/vif/{guest.domid}/3", f"/local/domain/{guest.domid}/device/vif/3"
    want = {"type": "vif", "ip": "10.0.0.2", "rate": "250000,20000", "mtu": "9000", "vifname": "web0", "handle": "3",
            "script": "vif-bridge", "gatewaydev": "eth0", "mac": mac[1], "online": "1"}  # fmt: skip
    assert {key: (read(f"{back}/{key}") or b"").decode() for key in want} == want
    assert [read(f"{front}/{key}") for key in ("mac", "handle", "mtu", "trusted", "backend-id")] == [
        mac[1].encode(), b"3", b"9000", b"0", b"0",
    ]  # fmt: skip
    assert read(f"{back}/bridge") is None
    # The next one takes the first number that is free, and another address.
    again = cli(net, "network-attach", guest.name)
    assert again.stdout.startswith("vif 0 (00:16:3e:") and mac[1] not in again.stdout, again.stderr
    fails(cli(net, "network-attach", guest.name, "devid=3"), "attached already", "detach it first")
    assert [words[0] for words in columns(net, guest)] == ["0", "3"]


def test_an_address_that_somebody_has(net: Bed, guests: Callable[[str], Guest]) -> None:
    a, b = guests("a"), guests("b")
    assert cli(net, "network-attach", a.name, f"mac={MAC}").returncode == 0
    done = cli(net, "network-attach", b.name, f"mac={MAC.upper()}")
    fails(done, f"mac={MAC} is that of /local/domain/0/backend/vif/{a.domid}/0", "choose another")
    assert columns(net, b) == []
    assert cli(net, "network-detach", a.name, "0").returncode == 0
    assert cli(net, "network-attach", b.name, f"mac={MAC}").returncode == 0, "it is free again"


def test_a_vif_that_has_no_address(net: Bed, guests: Callable[[str], Guest]) -> None:
    """Somebody has attached it by hand: who names no address has not that one."""
    a, b = guests("a"), guests("b")
    toolstack.attach(net.dom0.store, "vif", a.domid, 0)
    done = cli(net, "network-attach", b.name)
    assert done.returncode == 0, done.stderr
    assert columns(net, b)[0][2].startswith("00:16:3e:")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["wrong=1"], ["'wrong=1' is none of type=, mac=", "queues="]),
        (["mac=00:16:3e:1:2:3"], ["mac='00:16:3e:1:2:3' is no address of six bytes such as"]),
        (["mac=01:00:5e:00:00:01"], ["address of a group"]),
        (["bridge=xenbr9"], ["vif 0 of domain", "bridge", "xenbr9"]),
        (["bridge=switch:a/b"], ["vif 0 of domain", "letters, digits"]),
        (["backend=nobody"], ["domain 'nobody'", "there is none of that name"]),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(
    net: Bed, guest: Guest, words: list[str], said: list[str]
) -> None:
    fails(cli(net, "network-attach", guest.name, *words), *said)
    assert net.dom0.store.ls(f"/local/domain/0/backend/vif/{guest.domid}") is None
    assert net.dom0.store.ls(f"/local/domain/{guest.domid}/device/vif/0") is None


def test_a_domain_or_a_vif_that_is_not_there(net: Bed, guest: Guest) -> None:
    for verb in ("network-attach", "network-list"):
        fails(cli(net, verb, "nobody"), "domain 'nobody': there is none of that name", guest.name)
    fails(cli(net, "network-detach", "nobody", "0"), "domain 'nobody'")
    fails(cli(net, "network-detach", guest.name, "eth0"), "'eth0': neither a number (devid) nor an address")
    assert cli(net, "network-attach", guest.name, f"mac={MAC}").returncode == 0
    fails(cli(net, "network-detach", guest.name, OTHER), f"has no vif {OTHER}; it has: 0 ({MAC})")


def test_with_connect_the_guest_is_waited_for(net: Bed, guest: Guest) -> None:
    command = ["network-attach", "--connect", "--timeout", "3", guest.name, f"mac={MAC}"]
    fails(cli(net, *command), "vif 0 of domain", "the guest has not connected within 3 s: its state is 1")
    assert columns(net, guest) == [], "nothing is left"
    command[3] = "20"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cli, net, *command)
        until(lambda: net.dom0.store.read(f"/local/domain/{guest.domid}/device/vif/0/state"))
        guest.vif(0)
        done = waiting.result(30)
    assert done.stdout == f"vif 0 ({MAC}): attached to domain {guest.domid}, Connected\n", done.stderr


def test_a_guest_that_does_not_let_go(net: Bed, guests: Callable[[str], Guest]) -> None:
    a, b = guests("a"), guests("b")
    for guest in (a, b):
        assert cli(net, "network-attach", guest.name).returncode == 0
    deaf, other = a.vif(0), b.vif(0)
    assert deaf._watches is not None
    deaf._watches.close()  # an honest frontend closes when it is asked: this one is deaf
    done = cli(net, "network-detach", "--timeout", "1", a.name, "0")
    fails(done, "vif 0 of domain", "not let go within 1 s: backend Closing, frontend state 4", "--force")
    deaf.send(other.mac + deaf.mac + b"\x88\xb5still")
    assert other.receive(5).endswith(b"still"), "and it is served meanwhile"
    done = cli(net, "network-detach", "--force", a.name, "0")
    assert done.returncode == 0, done.stderr
    assert columns(net, a) == [] and len(columns(net, b)) == 1


def test_a_vif_that_xl_attached(net: Bed, guest: Guest) -> None:
    backend = toolstack.attach(net.dom0.store, "vif", guest.domid, 0, be={"mac": MAC})
    net.dom0.store.write(f"/libxl/{guest.domid}/device/vif/0/backend", backend)
    fails(cli(net, "network-detach", guest.name, "0"), f"xl network-detach {guest.domid} 0")
    assert columns(net, guest)[0][2] == MAC


def test_nobody_serves(bed: Callable[..., Bed]) -> None:
    with ExitStack() as stack:
        alone = bed()
        guest = Guest(alone, stack, "web")
        done = cli(alone, "network-attach", "--timeout", "1", "web")
        fails(done, "no backend has taken it within 1 s: is `pvdrivers serve` running in domain 0", "class vif")
        assert alone.dom0.store.ls(f"/local/domain/{guest.domid}/device/vif/0") is None
