"""The codec against itself and against Xen's header."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdrivers import xs_wire as wire

HEADER = Path("/usr/include/xen/io/xs_wire.h")


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=4096))
def test_round_trip(type_: int, req_id: int, tx_id: int, payload: bytes) -> None:
    data = wire.pack(type_, req_id, tx_id, payload)
    assert wire.unpack(b"??" + data + b"!", 2) == ((type_, req_id, tx_id, payload), 2 + len(data))
    for cut in (0, 15, len(data) - 1):
        assert wire.unpack(data[:cut]) is None


def test_limits() -> None:
    with pytest.raises(wire.WireError, match="4097"):
        wire.pack(0, 0, 0, bytes(4097))
    with pytest.raises(wire.WireError, match="4097"):
        wire.unpack(wire.HEADER.pack(0, 0, 0, 4097))


def test_errors_travel_by_name() -> None:
    assert wire.error_payload(errno.EAGAIN) == b"EAGAIN\0"
    assert wire.error_number(b"E2BIG\0") == errno.E2BIG
    assert wire.error_payload(errno.ETIMEDOUT) == b"EINVAL\0"
    assert wire.error_number(b"EWHATEVER\0") == errno.EINVAL


@pytest.mark.skipif(not HEADER.is_file(), reason="Xen's headers are not installed (libxen-dev)")
def test_numbers_are_those_of_xens_header() -> None:
    text = HEADER.read_text()
    body = re.sub(r"/\*.*?\*/|#define.*", "", text[text.index("{") : text.index("};")], flags=re.DOTALL)
    number = 0
    for name, expression in re.findall(r"\b(XS_\w+)\s*(?:=\s*([^,}]+))?", body):
        if expression.strip().startswith("XS_SET_TARGET"):
            number = wire.XS_SET_TARGET + int(expression.split("+")[1])
        elif expression:
            number = int(expression, 0)
        if hasattr(wire, name):
            assert getattr(wire, name) == number, name
        else:
            assert name == "XS_INVALID"
        number += 1
    for name in ("PAYLOAD_MAX", "ABS_PATH_MAX", "REL_PATH_MAX"):
        found = re.search(rf"XENSTORE_{name} (\d+)", text)
        assert found is not None and int(found[1]) == getattr(wire, name)
    errors = [getattr(errno, name) for name in re.findall(r"XSD_ERROR\((E\w+)\)", text)]
    assert list(wire.ERROR_NAMES) == errors
