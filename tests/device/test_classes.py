"""The table of device classes."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType

import pytest

from pvdrivers import classes
from pvdrivers.errors import ConfigError
from tests.device.bed import Disk


def test_a_class_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'vxx': there are .*vbd"):
        classes.load("vxx")


def test_others_may_add_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_class_of_others")
    compiled: list[int] = []
    vars(module).update(Disk=type("Disk", (Disk,), {"__module__": module.__name__}), warm=lambda: compiled.append(1))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = [
        metadata.EntryPoint("vnew", "a_class_of_others:Disk", classes.GROUP),
        metadata.EntryPoint("vbad", "a_class_of_others:warm", classes.GROUP),
        metadata.EntryPoint("vgone", "no_such_module:Disk", classes.GROUP),
        metadata.EntryPoint("vbd", "a_class_of_others:Disk", classes.GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == classes.GROUP else [])
    assert issubclass(classes.load("vnew"), Disk)
    with pytest.raises(ConfigError, match="is not a pvdrivers.device.Device"):
        classes.load("vbad")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        classes.load("vgone")
    assert classes.known()["vbd"] == classes.DEVICE_CLASSES["vbd"], "ours cannot be replaced"
