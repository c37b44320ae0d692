"""The part of ``pvdrivers check`` that is about the Xen which this host runs on."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

from pvdrivers import modprobe
from pvdrivers.xen import limits

from .finding import Finding, read

_NODES_PER_DISK = 35
"""In the backend's directory, by the toolstack and by us, and where errors are told."""
_NODES = 1000  # of a domain that is not dom0: xenstored's default
_GRANTS_PER_FRAME = 512
_UNITS = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")


def findings(root: Path = Path("/"), store: str | None = None) -> Iterator[Finding]:
    """Everything about Xen, by the files below `root`; `store` is where xenstore answers, if not at the usual place."""
    if read(root / "sys/hypervisor/type") != "xen":
        yield Finding("xen", False, "not running on Xen", "nothing to do: 'pvdrivers sim' embeds one")
        return
    domid = yield from _store(store)
    pv = read(root / "sys/hypervisor/guest_type") == "PV"
    dom0 = "control_d" in (read(root / "proc/xen/capabilities") or "") or domid == 0
    yield Finding("xen", True, f"{_version(root)}, {'PV' if pv else 'PVH or HVM'} {_role(dom0, domid)}")
    yield from _devices(root)
    yield _vbd(root)
    yield _grants(pv)
    yield from _mappings(root, pv)
    if not dom0:
        yield Finding(
            "xenstore quota",
            True,
            f"a driver domain has {_NODES} nodes by default, about {_NODES // _NODES_PER_DISK} disks; in dom0,"
            " xenstored -E or quota-maxentity in oxenstored.conf gives more",
        )
    yield _service(root)


def _version(root: Path) -> str:
    at = root / "sys/hypervisor/version"
    parts = [read(at / name) or "?" for name in ("major", "minor")]
    return "Xen " + ".".join(parts) + (read(at / "extra") or "")


def _role(dom0: bool, domid: int | None) -> str:
    if dom0:
        return "dom0"
    return "domain" if domid is None else f"domain {domid}: guests name it as backend= (a driver domain)"


def _store(path: str | None) -> Generator[Finding, None, int | None]:
    """Whether xenstore answers, and who it says that we are."""
    from pvdrivers.xenstore import XenStoreClient, default_path

    where = path or default_path()
    domid = None
    try:
        with XenStoreClient.connect(where, timeout=5) as client:
            raw = client.read("domid")
            domid = int(raw) if raw is not None and raw.strip(b"\0").isdigit() else None
    except OSError as e:
        advice = "start it: /etc/init.d/xen start, or systemctl start xenstored; in a driver domain, modprobe xenfs"
        yield Finding("xenstore", False, f"{where}: {e.strerror}", advice, essential=True)
        return None
    if domid is None:
        text = f"{where} does not say which domain this is"
        yield Finding("xenstore", False, text, "xen-init-dom0 does that in dom0; init scripts run it", essential=True)
    else:
        yield Finding("xenstore", True, f"{where}, domain {domid}")
    return domid


def _devices(root: Path) -> Iterator[Finding]:
    for name, module, essential, what in (
        ("gntdev", "xen-gntdev", True, "pages of guests"),
        ("evtchn", "xen-evtchn", True, "events"),
        ("gntalloc", "xen-gntalloc", False, "pages of our own, for frontends only"),
    ):
        device = root / "dev/xen" / name
        if not device.exists():
            yield Finding(f"xen {name}", False, f"no {device}: {what}", f"modprobe {module}", essential)
        elif not os.access(device, os.R_OK | os.W_OK):
            advice = "run as root, or change its group"
            yield Finding(f"xen {name}", False, f"{device} is not ours to use: {what}", advice, essential)
        else:
            limit = read(root / "sys/module/xen_gntalloc/parameters/limit") if name == "gntalloc" else None
            most = f", at most {limit} (/sys/module/xen_gntalloc/parameters/limit)" if limit else ""
            yield Finding(f"xen {name}", True, f"{device}: {what}{most}")


def _vbd(root: Path) -> Finding:
    """Who would serve a disk that xl attaches."""
    if modprobe.in_kernel("vbd", root):
        return Finding(
            "xen vbd",
            True,
            "xen-blkback is loaded: disks that xl attaches are the kernel's, those of `pvdrivers block-attach` ours;"
            " docs/dom0.md says how all can be ours",
        )
    if kept := modprobe.kept_out(modprobe.MODULES["vbd"], root):
        return Finding("xen vbd", True, f"disks that xl attaches are ours: {kept} keeps xen-blkback out")
    return Finding(
        "xen vbd",
        False,
        "xen-blkback is not loaded, but udev loads it when the first guest gets a disk",
        "copy examples/dom0/modprobe-pvdrivers.conf to /etc/modprobe.d, or leave vbd to it (serve --class pvblk)",
    )


def _grants(pv: bool) -> Finding:
    from pvdrivers import classes

    frames, pages = limits.maptrack_frames(), limits.mappable_pages(pv)
    disks = [
        f"{pages // most} with policy={policy}"
        for policy, most in classes.load("pvblk").pages_mapped().items()
        if most <= pages
    ]
    return Finding(
        "xen grants",
        True,
        f"{pages} pages of guests may be mapped (3/4 of {limits.PARAMETER}={frames} on Xen's command line"
        f"{', a page counts twice in a PV domain' if pv else ''}): disks of one queue, all at their most: "
        f"{', '.join(disks)}. Beyond that less is kept, and the rest copied",
    )


def _mappings(root: Path, pv: bool) -> Iterator[Finding]:
    """Whether the kernel lets a process map as much as Xen does."""
    maps, pages = limits.max_map_count(root), limits.mappable_pages(pv)
    if (ours := limits.mapping_pages(maps)) is None:
        return
    text = f"{ours} pages in one process (vm.max_map_count={maps}: two for each, and some that it wants itself)"
    if ours >= pages:
        yield Finding("xen mappings", True, text)
    else:
        advice = "copy examples/dom0/sysctl-pvdrivers.conf to /etc/sysctl.d, sysctl --system, and restart the service"
        yield Finding("xen mappings", False, f"{text}, fewer than Xen has room for: {pages}", advice)


def _service(root: Path) -> Finding:
    for directory in _UNITS:
        if (root / directory / "pvdrivers.service").exists():
            enabled = (root / "etc/systemd/system/multi-user.target.wants/pvdrivers.service").is_symlink()
            how = "enabled" if enabled else "not enabled: systemctl enable --now pvdrivers"
            return Finding("service", True, f"{root / directory / 'pvdrivers.service'}, {how}")
    return Finding("service", False, "no unit pvdrivers.service", "examples/dom0 has one; docs/dom0.md says how")
