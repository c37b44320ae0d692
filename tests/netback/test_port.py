"""What the key `bridge` may say."""

from __future__ import annotations

import pytest

from netback.port import PortSpec, parse_port, parse_uplink


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("switch:", PortSpec("switch", "pvdrivers")),
        ("switch:lan", PortSpec("switch", "lan")),
        ("switch:lan;vlan=5", PortSpec("switch", "lan", vlan=5)),
        ("switch:lan,trunk=5+10-12", PortSpec("switch", "lan", trunk=frozenset({5, 10, 11, 12}))),
        ("switch:lan,trunk", PortSpec("switch", "lan", trunk=frozenset(range(1, 4095)))),
        ("null:", PortSpec("null", "")),
        ("xenbr0", PortSpec("bridge", "", bridge="xenbr0")),
        ("xenbr0;netns=a", PortSpec("bridge", "", bridge="xenbr0", netns="a")),
        ("tap:t0", PortSpec("tap", "t0")),
        (
            "tap:t0,bridge=br0;netns=a,ip=10.0.0.1/24,ip=fd00::1/64",
            PortSpec("tap", "t0", bridge="br0", netns="a", ips=("10.0.0.1/24", "fd00::1/64")),
        ),
        ("packet:eth0", PortSpec("packet", "eth0")),
    ],
)
def test_ports(text: str, spec: PortSpec) -> None:
    assert parse_port(text) == spec


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no name of an interface"),
        ("null:x", "no port that is known"),
        ("macvtap:x", "no port that is known"),
        ("switch:a b", "letters, digits"),
        ("switch:a,mtu=9000", "'mtu' is no option of a switch port"),
        ("switch:a,vlan=0", "not from 1 to 4094"),
        ("switch:a,vlan=x", "not from 1 to 4094"),
        ("switch:a,trunk=5-3", "is no range"),
        ("tap:", "no name of an interface"),
        ("tap:sixteen-letters-", "no name of an interface"),
        ("tap:a/b", "no name of an interface"),
        ("tap:t,netns=../x", "no name of a network namespace"),
        ("tap:t,ip=10.0.0.1/33", "no address with a length"),
        ("tap:t,vlan=5", "'vlan' is no option of a tap port"),
        ("packet:eth0,bridge=br0", "'bridge' is no option"),
        ("null:,vlan=5", "there are none"),
    ],
)
def test_what_is_no_port(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_port(text)


def test_uplinks() -> None:
    assert parse_uplink("lan=tap:t0,bridge=br0,mtu=9000,trunk=5") == (
        "lan", PortSpec("tap", "t0", bridge="br0", mtu=9000, trunk=frozenset({5})),
    )  # fmt: skip
    assert parse_uplink("lan=xenbr0") == ("lan", PortSpec("bridge", "pv-lan", bridge="xenbr0"))
    for text in ("lan", "=tap:x", "lan=null:", "a/b=tap:x"):
        with pytest.raises(ValueError, match=r"SWITCH=PORT|an uplink is"):
            parse_uplink(text)
