"""`pvdrivers capture`: what a vif carries, in a file that tcpdump reads, and that our own small parser checks."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import sim
from pvdrivers.frontends.netfront import CSUM_BLANK, Frame, Netfront
from pvdrivers.sim import toolstack

from .conftest import COMMAND, Daemon, Guest, until
from .spaces import need
from .test_switch import udp

pytestmark = pytest.mark.jit_only("a real daemon serves")


class Capture:
    """A capture that runs."""

    def __init__(self, guest: Guest, out: Path, *options: str) -> None:
        self.out = out
        self.popen = subprocess.Popen(
            [*COMMAND, "capture", guest.name, str(out), "--run-dir", str(guest.net.run_dir), *options],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.popen.stderr is not None
        self.said = self.popen.stderr.readline()

    def end(self) -> str:
        self.popen.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> str:
        assert self.popen.stderr is not None
        said = self.popen.stderr.read()
        assert self.popen.wait(20) == 0
        self.popen.stderr.close()
        return said


def options_of(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while data:
        code, size = struct.unpack_from("<HH", data)
        if code == 0:
            break
        found[code] = data[4 : 4 + size]
        data = data[4 + (size + 3 & ~3) :]
    return found


def blocks(path: Path) -> list[tuple[int, bytes]]:
    data, found = path.read_bytes(), []
    while data:
        kind, size = struct.unpack_from("<II", data)
        assert size % 4 == 0 and struct.unpack_from("<I", data, size - 4)[0] == size
        found.append((kind, data[8 : size - 4]))
        data = data[size:]
    return found


def packets(path: Path) -> list[tuple[int, bytes, int, dict[int, bytes]]]:
    """Interface, bytes, size and options of each."""
    found = []
    for kind, body in blocks(path):
        if kind == 6:
            interface, _, _, have, size = struct.unpack_from("<IIIII", body)
            rest = body[20 + (have + 3 & ~3) :]
            found.append((interface, body[20 : 20 + have], size, options_of(rest)))
    return found


def test_both_directions(net: Any, tmp_path: Path) -> None:
    """Every byte, whichever guest's page it was in; with direction, queue, segments, and what is blank."""
    need("tcpdump")
    a, b, c = net.guest(), net.guest(), net.guest()
    capture = Capture(a, tmp_path / "a.pcapng")
    assert "capturing vif-" in capture.said
    blank, _ = udp(os.urandom(3000))
    sent = [
        Frame(a.frame(b, os.urandom(10))),
        Frame(a.frame(b, os.urandom(50_000))),
        Frame(a.frame(b, blank, 0x800), CSUM_BLANK),
        Frame(a.frame(b, os.urandom(60_000), 0x800), CSUM_BLANK, 1448, 1),
    ]
    for frame in sent:
        a.vif.send_all([frame])
        assert b.vif.receive_all(1, 5) == [frame]
    back = b.frame(a, os.urandom(9000))
    b.vif.send(back)
    assert a.vif.receive(5) == back
    b.vif.send(b.frame(c, b"not a's"))
    c.vif.receive(5)
    until(lambda: capture.out.stat().st_size > 120_000)
    assert "5 packets, 0 lost" in capture.end()
    found = packets(capture.out)
    assert [data for _, data, _, _ in found] == [*(frame.data for frame in sent), back]
    flags = [struct.unpack("<I", options[2])[0] for _, _, _, options in found]
    assert flags == [2, 2, 2, 2, 1]
    comments = [options.get(1, b"").decode() for _, _, _, options in found]
    assert comments == ["", "", "checksum blank", "GSO TCPv4, segments of 1448 bytes; checksum blank", ""]
    said = subprocess.run(["tcpdump", "-n", "-e", "-r", str(capture.out)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert sum("ethertype" in line for line in said.stdout.splitlines()) == 5
    assert "10.0.0.1.7 > 10.0.0.2.9: UDP, length 3000" in said.stdout
    a.vif.send(a.frame(b))  # nobody looks any more
    assert b.vif.receive(5) == a.frame(b)


def test_wireshark_reads_all_of_it(net: Any, tmp_path: Path) -> None:
    """By its own parser: which interface, which queue, which way, and what we say beside a packet."""
    need("tshark")
    need("capinfos")
    a, b = net.guest(queues=2), net.guest()
    capture = Capture(a, tmp_path / "w.pcapng", "--packets", "4")
    blank, _ = udp(os.urandom(3000))
    for queue, frame in enumerate((Frame(a.frame(b, blank, 0x800), CSUM_BLANK), Frame(a.frame(b, bytes(100))))):
        a.vif.send_all([frame], queue=queue)
        b.vif.receive(5)
    a.vif.send_all([Frame(a.frame(b, os.urandom(60_000), 0x800), CSUM_BLANK, 1448, 1)], queue=1)
    b.vif.receive(5)
    b.vif.send(b.frame(a, bytes(64)))
    assert "4 packets, 0 lost" in capture.wait()
    fields = ("frame.interface_name", "frame.interface_queue", "frame.packet_flags_direction", "frame.comment",
              "frame.len", "eth.src")  # fmt: skip
    said = subprocess.run(
        ["tshark", "-n", "-r", str(capture.out), "-T", "fields", *(word for name in fields for word in ("-e", name))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    found = [line.split("\t") for line in said.stdout.splitlines()]
    mac, segments = a.mac.hex(":"), "GSO TCPv4, segments of 1448 bytes; checksum blank"
    assert found[:3] == [
        [f"{a.name}.q0", "0", "0x00000002", "checksum blank", str(14 + len(blank)), mac],
        [f"{a.name}.q1", "1", "0x00000002", "", "114", mac],
        [f"{a.name}.q1", "1", "0x00000002", segments, "60014", mac],
    ]
    assert found[3][2:] == ["0x00000001", "", "78", b.mac.hex(":")]
    facts = subprocess.run(["capinfos", "-M", str(capture.out)], capture_output=True, text=True)
    assert facts.returncode == 0, facts.stderr
    assert "Number of packets:   4" in facts.stdout and "Number of interfaces in file: 2" in facts.stdout


def test_an_interface_a_queue(net: Any, tmp_path: Path) -> None:
    a, b = net.guest(queues=3), net.guest()
    capture = Capture(a, tmp_path / "q.pcapng", "--packets", "40", "--snaplen", "64")
    for flow in range(40):
        packet, _ = udp(bytes(100))
        a.vif.send_all([Frame(a.frame(b, packet[:20] + flow.to_bytes(2, "big") + packet[22:], 0x800))], queue=flow % 3)
        b.vif.receive(5)
    assert "40 packets" in capture.wait()
    names = [options_of(body[8:])[2].decode() for kind, body in blocks(capture.out) if kind == 1]
    assert sorted(names) == [f"{a.name}.q{q}" for q in range(3)]
    for interface, data, size, options in packets(capture.out):
        assert (len(data), size) == (64, 14 + 128)
        assert names[interface].endswith(f".q{struct.unpack('<I', options[6])[0]}")


def test_what_finds_no_room_is_counted(net: Any, tmp_path: Path) -> None:
    """The reader sleeps; memory is bounded, nothing waits, and the file says what it lacks."""
    a, b = net.guest(), net.guest()
    capture = Capture(a, tmp_path / "lost.pcapng", "--buffer", "1")
    os.kill(capture.popen.pid, signal.SIGSTOP)
    try:
        for _ in range(100):
            a.vif.send(a.frame(b, bytes(30_000)))
            b.vif.receive(5)
    finally:
        os.kill(capture.popen.pid, signal.SIGCONT)
    said = capture.end()
    (stats,) = [options_of(body[12:]) for kind, body in blocks(capture.out) if kind == 5]
    received, dropped = (struct.unpack("<Q", stats[code])[0] for code in (4, 5))
    assert received == 100
    assert 50 < dropped < 90 and f"{100 - dropped} packets, {dropped} lost" in said
    assert len(packets(capture.out)) == 100 - dropped
    assert b.counted("received") == 100


def test_who_asks_for_what_is_not_there(net: Any, tmp_path: Path) -> None:
    a, b = net.guest(), net.guest()
    run = ["--run-dir", str(net.run_dir)]
    for name, text in (("vif-999-0", "serves no device of the name"), ("eth0", "is no vif")):
        done = subprocess.run([*COMMAND, "capture", name, str(tmp_path / "x"), *run], capture_output=True, text=True)
        assert done.returncode == 1
        assert text in done.stderr
    capture = Capture(a, tmp_path / "first")
    done = subprocess.run([*COMMAND, "capture", a.name, str(tmp_path / "x"), *run], capture_output=True, text=True)
    assert "there is a capture already" in done.stderr
    capture.popen.kill()  # which the daemon sees, and lets go
    capture.popen.wait()
    assert capture.popen.stderr is not None
    capture.popen.stderr.close()
    a.vif.send(a.frame(b))
    assert b.vif.receive(5) == a.frame(b)
    again = Capture(a, tmp_path / "again")
    assert "capturing" in again.said
    again.end()


def test_a_vif_of_whatever_kind_is_found(net: Any, tmp_path: Path) -> None:
    """`--class pvnet` has pvnet-D-V: by that name, by vif-D-V, and by D-V."""
    mac = "00:16:3e:00:fe:01"
    daemon = Daemon(net.run_dir, tmp_path / "log", "--class", "pvnet")
    domain = toolstack.create_domain(net.dom0, memory_mib=16)
    platform = sim.open(net.run_dir, domain.domid, domain.token)
    toolstack.attach(net.dom0.store, "pvnet", domain.domid, 0, be={"mac": mac, "handle": 0}, fe={"mac": mac})
    vif = Netfront(platform, 0)
    try:
        vif.connect(20)
        for number, prefix in enumerate(("pvnet-", "vif-", "")):
            out = tmp_path / f"{number}.pcapng"
            command = [*COMMAND, "capture", f"{prefix}{domain.domid}-0", str(out), "--run-dir", str(net.run_dir)]
            with subprocess.Popen([*command, "--packets", "1"], stderr=subprocess.PIPE, text=True) as popen:
                assert popen.stderr is not None
                assert popen.stderr.readline() == f"capturing pvnet-{domain.domid}-0\n"
                vif.send(b"\xff" * 6 + vif.mac + b"\x88\xb5one")
                assert "1 packets" in popen.stderr.read()
    finally:
        vif.close()
        platform.close()
        toolstack.clean(net.dom0.store, domain.domid, domain.uuid)
        daemon.stop()
