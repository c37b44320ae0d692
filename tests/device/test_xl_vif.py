"""xl's words for a vif, and what libxl would write for them."""

from __future__ import annotations

import pytest

from pvdrivers.errors import ConfigError
from pvdrivers.xl_vif import XlVif, new_mac, parse_mac, parse_rate, parse_xl_vif


@pytest.mark.parametrize(
    "words",
    [
        ["mac=00:16:3E:12:34:56,bridge=switch:lan,mtu=9000"],
        ["mac=00:16:3e:12:34:56", "bridge=switch:lan", "mtu=9000"],
        ["bridge=switch:lan , mac=00:16:3e:12:34:56,", "mtu=9000", "mtu=9000"],
    ],
)
def test_however_it_is_written(words: list[str]) -> None:
    keys = {"type": "vif", "bridge": "switch:lan", "mtu": 9000}
    assert parse_xl_vif(words) == XlVif("00:16:3e:12:34:56", None, 9000, True, "0", keys)


def test_nothing_is_a_vif_as_well() -> None:
    assert parse_xl_vif([]) == XlVif(keys={"type": "vif"})


def test_all_words() -> None:
    words = "backend=net devid=2 untrusted netdev=eth0 queues=4 script=/etc/xen/scripts/vif-bridge"
    vif = parse_xl_vif(words.split())
    assert (vif.backend, vif.devid, vif.trusted) == ("net", 2, False)
    assert vif.keys == {"type": "vif", "gatewaydev": "eth0", "queues": 4, "script": "/etc/xen/scripts/vif-bridge"}


@pytest.mark.parametrize(
    ("text", "bytes_usecs"),
    # xl-network-configuration(5): "'rate=10Mb/s', 'rate=250KB/s', 'rate=1MB/s@20ms'"
    [("10Mb/s", (62_500, 50_000)), ("250KB/s", (12_500, 50_000)), ("1MB/s@20ms", (20_000, 20_000)),
     ("8b/s@1s", (1, 1_000_000)), ("1GB/s@1us", (1_000, 1)), ("1B/s@1", (1, 1_000_000)), ("3B/s@500m", (1, 500_000))],
)  # fmt: skip
def test_rates(text: str, bytes_usecs: tuple[int, int]) -> None:
    assert parse_rate(text) == bytes_usecs
    assert parse_xl_vif([f"rate={text}"]).keys["rate"] == "{},{}".format(*bytes_usecs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rate=10", "written as 10MB/s"), ("rate=10MB/s@", "written as"), ("rate=0B/s", "from 1 to"),
        ("rate=1B/s@1us", "less than one byte in 1 us"), ("rate=1GB/s@5000s", "from 1 to"),
        ("mac=00:16:3e:12:34", "no address of six bytes"), ("mac=00:00:00:00:00:00", "nobody's"),
        ("mac=33:33:00:00:00:01", "address of a group"), ("mtu=67", "from 68 to 65521"), ("mtu=1e3", "a number from"),
        ("queues=0", "from 1 to 16"), ("devid=-1", "from 0"), ("type=ioemu", "QEMU's"), ("type=tap", "must be vif"),
        ("model=e1000", "leave it out"), ("script=/root/mine", "none is run here"), ("colour=red", "none of type="),
        ("mtu=1500 mtu=9000", "mtu is given twice"), ("trusted untrusted", "trusted is given twice"),
        ("ip=", "no value"), ("bridge", "is none of"), ("bridge=a\x07", "printable"),
    ],
)  # fmt: skip
def test_what_is_wrong(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match="^vif '") as error:
        parse_xl_vif(words.split(" "))
    assert said in str(error.value)


def test_addresses_that_are_made() -> None:
    made = {new_mac() for _ in range(100)}
    assert len(made) > 90
    for mac in made:
        assert parse_mac(mac) == mac and mac.startswith("00:16:3e:") and int(mac[9:11], 16) < 0x80
