"""Domains: who may join, what they may see, when they end; and the run directory."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvdrivers import sim, windows
from pvdrivers.errors import ConfigError, PlatformError
from pvdrivers.sim import toolstack, wire
from pvdrivers.sim.hypercall import HypercallError, Hypercalls
from pvdrivers.sim.launch import EmbeddedXen
from pvdrivers.xenstore import XenStoreError
from tests.xenstore.conftest import heard


def refused(number: int) -> Any:
    return pytest.raises(HypercallError, match=errno.errorcode[number])


def test_a_guest_needs_its_token(run_dir: Path, domain: toolstack.Domain) -> None:
    for token in (None, b"", bytes(16), domain.token[:15], domain.token + b"x"):
        with refused(errno.EACCES):
            sim.open(run_dir, domain.domid, token)
    sim.open(run_dir, domain.domid, domain.token.hex()).close()


def test_there_is_no_such_domain(run_dir: Path) -> None:
    with refused(errno.ESRCH):
        sim.open(run_dir, 30000, bytes(16))
    with pytest.raises(PlatformError, match="32751"):
        sim.open(run_dir, 0x7FF0, bytes(16))


def test_a_guest_is_no_toolstack(guest: Any, domain: toolstack.Domain) -> None:
    for op, *args in (
        (wire.CREATE_DOMAIN, 10, 0), (wire.DESTROY_DOMAIN, domain.domid), (wire.LIST_DOMAINS, 0),
        (wire.EVTCHN_STATUS, 0, 1),
    ):  # fmt: skip
        with refused(errno.EPERM):
            guest.hypercalls.call(op, *args)


def test_memory_of_others_is_for_those_who_were_granted_some(dom0: Any, join: Callable[..., Any], guest: Any) -> None:
    other = join(toolstack.create_domain(dom0, memory_mib=4))
    for domid in (0, guest.domid):
        with refused(errno.EACCES):
            other.prepare(domid)
    pages = guest.pages.alloc(1)
    gref = guest.pages.grant(pages.frames[0], other.domid)
    with other.grants.map(guest.domid, [gref]) as mapping:
        assert mapping.pages == 1
    private = guest.pages.grant(pages.frames[0], 0)
    with pytest.raises(PlatformError, match=str(private)):
        other.grants.map(guest.domid, [private])


def test_store_connections_are_authenticated(dom0: Any, guest: Any, domain: toolstack.Domain) -> None:
    backend = toolstack.attach_vbd(dom0.store, domain.domid, "xvda", "/disk.img")
    assert guest.store.read(f"{backend}/params") == b"/disk.img"
    for path in (f"{backend}/params", f"{backend}/state", f"{backend}/new", "/local/domain/0/backend/vbd/new", "/new",
                 f"/local/domain/{domain.domid}/new", f"/local/domain/{domain.domid}/device/new"):  # fmt: skip
        with pytest.raises(XenStoreError, match="EACCES"):
            guest.store.write(path, "1")
    own = f"/local/domain/{domain.domid}/device/vbd/51712"
    guest.store.write(f"{own}/state", "3")
    guest.store.write(f"{own}/ring-ref", "9")
    guest.store.write(f"/local/domain/{domain.domid}/data/anything", "1")
    assert dom0.store.read(f"{own}/state") == b"3"


def test_directories_as_libxl_makes_them(dom0: Any, domain: toolstack.Domain) -> None:
    backend = toolstack.attach_vbd(
        dom0.store, domain.domid, 51728, "null:", mode="r", be={"max-ring-page-order": 2}, fe={"trusted": 0}
    )
    frontend = f"/local/domain/{domain.domid}/device/vbd/51728"
    assert backend == f"/local/domain/0/backend/vbd/{domain.domid}/51728"
    read = dom0.store.read
    assert {k: read(f"{backend}/{k}") for k in dom0.store.ls(backend)} == {
        "frontend": frontend.encode(), "frontend-id": b"%d" % domain.domid, "online": b"1", "params": b"null:",
        "type": b"phy", "dev": b"51728", "removable": b"0", "bootable": b"1", "mode": b"r", "device-type": b"disk",
        "discard-enable": b"1", "specification": b"xen", "max-ring-page-order": b"2", "state": b"1",
    }  # fmt: skip
    assert {k: read(f"{frontend}/{k}") for k in dom0.store.ls(frontend)} == {
        "backend": backend.encode(), "backend-id": b"0", "virtual-device": b"51728", "device-type": b"disk",
        "trusted": b"0", "state": b"1",
    }  # fmt: skip
    assert dom0.store.get_perms(f"{backend}/state") == ["n0", f"r{domain.domid}"]
    assert dom0.store.get_perms(f"{frontend}/state") == [f"n{domain.domid}", "r0"]
    with pytest.raises(PlatformError, match="attached already"):
        toolstack.attach_vbd(dom0.store, domain.domid, 51728, "null:")


def test_detach_asks_the_backend(dom0: Any, domain: toolstack.Domain) -> None:
    backend = toolstack.attach_vbd(dom0.store, domain.domid, "xvda", "null:")
    assert not toolstack.detach(dom0.store, backend, timeout=0.05)
    assert dom0.store.read(f"{backend}/online") == b"0"
    assert dom0.store.read(f"{backend}/state") == b"5"
    dom0.store.write(f"{backend}/state", 6)
    assert toolstack.detach(dom0.store, backend)
    assert dom0.store.read(f"{backend}/state") is None
    assert dom0.store.read(f"/local/domain/{domain.domid}/device/vbd/51712/state") is None


@pytest.mark.parametrize(
    ("name", "number"),
    [("xvda", 51712), ("xvdb", 51728), ("xvda1", 51713), ("xvdp15", 51967), ("xvdq", 1 << 28 | 16 << 8), ("sda", 2048),
     ("sdb2", 2066), ("hda", 768), ("hdb", 832), ("hdc", 5632), ("xvdaa", 1 << 28 | 26 << 8)],
)  # fmt: skip
def test_names_of_virtual_devices(name: str, number: int) -> None:
    assert toolstack.devid_of(name) == number


@pytest.mark.parametrize("name", ["", "vda", "xvd", "xvdA", "sdq", "hde", "xvda1234", "xvda\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError):
        toolstack.devid_of(name)


def test_a_domain_ends_with_its_last_handle(dom0: Any, join: Callable[..., Any], domain: toolstack.Domain) -> None:
    dom0.store.watch("@releaseDomain", "gone")
    dom0.store.events()
    first, second = join(domain), join(domain)
    back = dom0.open_events()
    ours = back.bind_interdomain(domain.domid, second.hypercalls.call(wire.EVTCHN_ALLOC_UNBOUND, 0).values[0])
    first.close()
    assert dom0.domain_uuid(domain.domid) == domain.uuid
    second.close()
    deadline = time.monotonic() + 10
    while dom0.domain_uuid(domain.domid) and time.monotonic() < deadline:
        time.sleep(0.01)  # our question may be read before the end of the other connection
    assert dom0.domain_uuid(domain.domid) == ""
    assert back.status(ours)[0] == wire.EVTCHNSTAT_unbound
    assert ("@releaseDomain", "gone") in heard(dom0.store, 5)
    back.close()


def test_destroy(dom0: Any, join: Callable[..., Any], domain: toolstack.Domain) -> None:
    guest = join(domain)
    toolstack.attach_vbd(dom0.store, domain.domid, "xvda", "null:")
    toolstack.destroy(dom0, domain.domid)
    assert dom0.store.ls(f"/local/domain/{domain.domid}") is None
    assert dom0.store.ls(f"/local/domain/0/backend/vbd/{domain.domid}") is None
    with refused(errno.ECONNRESET):
        guest.hypercalls.call(wire.DOMAIN_INFO, domain.domid)
    with refused(errno.ESRCH):
        toolstack.destroy(dom0, domain.domid)
    with refused(errno.EINVAL):
        dom0.hypercalls.call(wire.DESTROY_DOMAIN, 0)


def test_domids_and_uuids_are_new_each_time(dom0: Any) -> None:
    domains = [toolstack.create_domain(dom0, memory_mib=1) for _ in range(5)]
    assert len({d.domid for d in domains}) == len({d.uuid for d in domains}) == len({d.token for d in domains}) == 5
    assert domains[0].token.hex() not in repr(domains[0])
    for domain in domains:
        toolstack.destroy(dom0, domain.domid)


def test_many_domains_are_listed(dom0: Any) -> None:
    """More than one answer holds."""
    made = [dom0.hypercalls.call(wire.CREATE_DOMAIN, 1, 64).values[0] for _ in range(100)]
    listed = [d.domid for d in toolstack.list_domains(dom0.hypercalls)]
    assert set(made) < set(listed) and len(listed) == len(set(listed))
    for domid in made:
        dom0.hypercalls.call(wire.DESTROY_DOMAIN, domid)


def test_a_backend_forgets_domains_that_are_gone(dom0: Any, join: Callable[..., Any]) -> None:
    for _ in range(5):
        domain = toolstack.create_domain(dom0, memory_mib=1)
        guest = join(domain)
        dom0.grants.map(domain.domid, [guest.pages.grant(guest.pages.alloc(1).frames[0], 0)]).unmap()
        guest.close()
    last = toolstack.create_domain(dom0, memory_mib=1)
    dom0.prepare(last.domid)
    assert list(dom0.grants._foreign) == [last.domid]


def test_a_page_is_mapped_while_others_are_forgotten(
    dom0: Any, join: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked about has left the line for as long as that takes."""
    domain, other = (toolstack.create_domain(dom0, memory_mib=1) for _ in range(2))
    guest = join(domain)
    gref = guest.pages.grant(guest.pages.alloc(1).frames[0], 0)
    asked, exists, reserve = threading.Event(), dom0.grants._exists, windows.reserve
    thread = threading.Thread(target=dom0.prepare, args=(other.domid,))

    def slow(domid: int) -> bool:
        if domid == domain.domid:
            asked.set()
            time.sleep(0.2)
        return bool(exists(domid))

    def meanwhile(size: int) -> int:
        thread.start()
        assert asked.wait(10)
        return reserve(size)

    monkeypatch.setattr(dom0.grants, "_exists", slow)
    with monkeypatch.context() as patch:
        patch.setattr(windows, "reserve", meanwhile)
        mapping = dom0.grants.map(domain.domid, [gref])
    thread.join()
    mapping.unmap()
    guest.close()


def test_too_much_memory(dom0: Any) -> None:
    for mib in (1 << 19, 1 << 20, 1 << 23):
        with pytest.raises(PlatformError, match="--memory"):
            toolstack.create_domain(dom0, memory_mib=mib)
    with pytest.raises(PlatformError, match="EINVAL"):
        dom0.hypercalls.call(wire.CREATE_DOMAIN, 0, 0)
    with pytest.raises(PlatformError, match="EINVAL"):
        dom0.hypercalls.call(wire.CREATE_DOMAIN, 10, wire.MOST_GRANTS + 1)


def test_the_limit_of_all_domains_together(tmp_path: Path) -> None:
    with EmbeddedXen(tmp_path / "xen", memory_mib=16):
        dom0 = sim.open(tmp_path / "xen")
        one = toolstack.create_domain(dom0, memory_mib=10)
        with pytest.raises(PlatformError, match="--memory"):
            toolstack.create_domain(dom0, memory_mib=10)
        toolstack.destroy(dom0, one.domid)
        toolstack.create_domain(dom0, memory_mib=16)
        dom0.close()


def test_memory_cannot_be_resized(guest: Any, domain: toolstack.Domain, run_dir: Path) -> None:
    """A guest that shrinks its memory would kill its backend by SIGBUS."""
    handle = Hypercalls(run_dir, domain.domid, domain.token, flags=wire.WANT_MEMORY)
    handle.close()
    for fd in handle.hello.fds:
        with pytest.raises(OSError):
            os.ftruncate(fd, 4096)
        with pytest.raises(OSError):
            os.ftruncate(fd, 1 << 30)
        os.close(fd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_order(tmp_path: Path, number: int) -> None:
    run_dir = tmp_path / "xen"
    xen = EmbeddedXen(run_dir)
    assert os.stat(run_dir).st_mode & 0o777 == 0o700
    dom0 = sim.open(run_dir)
    xen.process.send_signal(number)
    assert xen.process.wait(10) == 0
    xen.close()
    assert sorted(p.name for p in run_dir.iterdir() if p.is_socket()) == []
    with pytest.raises(PlatformError, match="is gone"):
        dom0.hypercalls.call(wire.DOMAIN_INFO, 0)
    dom0.close()
    with EmbeddedXen(run_dir):
        sim.open(run_dir).close()
    with pytest.raises(PlatformError, match="pvdrivers sim --run-dir"):
        sim.open(run_dir)


def test_killed_and_started_again(tmp_path: Path) -> None:
    """Sockets that a dead hypervisor left are replaced."""
    first = EmbeddedXen(tmp_path)
    first.process.kill()
    first.close()
    with EmbeddedXen(tmp_path):
        sim.open(tmp_path).close()


def failing_sim(run_dir: Path) -> str:
    command = [sys.executable, "-m", "pvdrivers", "sim", "--run-dir", os.fspath(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    return done.stderr


def test_one_hypervisor_for_one_directory(run_dir: Path) -> None:
    assert "running on it already" in failing_sim(run_dir)
    sim.open(run_dir).close()


def test_a_directory_that_others_can_write(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    os.chmod(tmp_path / "open", 0o777)
    assert "chmod 700" in failing_sim(tmp_path / "open")


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    assert "107" in failing_sim(tmp_path / ("x" * 120))


def test_a_handle_that_does_not_read_is_dropped(run_dir: Path, dom0: Any) -> None:
    rude = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rude.connect(os.fspath(run_dir / wire.SOCKET))
    rude.setblocking(False)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            rude.send(wire.REQUEST.pack(wire.LIST_DOMAINS, *[0] * 7))
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            break
    else:
        pytest.fail("still connected")
    assert dom0.domain_uuid(0)
    rude.close()
