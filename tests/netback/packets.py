"""TCP packets for tests, and what is to become of them when they are cut: in plain Python, said once more."""

from __future__ import annotations

FIN, PSH, ACK, CWR = 1, 8, 16, 128


def ones(*parts: bytes) -> int:
    """The sum of RFC 1071 over 16-bit words, not complemented. All parts but the last have an even size."""
    data = b"".join(parts)
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(addresses: bytes, size: int, protocol: int = 6) -> int:
    return ones(addresses, size.to_bytes(4, "big"), protocol.to_bytes(4, "big"))


def tcp(
    version: int, payload: bytes, *, flags: int = ACK, seq: int = 0xFFFFF000, options: bytes = b"", tags: int = 0,
    ident: int = 0xFFFE, ip_options: bytes = b"", macs: bytes = bytes(12), blank: bool = True, extension: bool = False,
) -> bytes:  # fmt: skip
    """A frame. `ip_options` are of IPv4, `extension` is a header of hop-by-hop options of IPv6."""
    size = 20 + len(options) + len(payload)
    head = bytes([0x12, 0x34, 0, 80]) + (seq & 0xFFFFFFFF).to_bytes(4, "big") + b"\1\2\3\4"
    head += bytes([(20 + len(options)) // 4 << 4, flags, 0xFA, 0xF0])
    if version == 4:
        addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
        ip = bytes([0x45 + len(ip_options) // 4, 0]) + (20 + len(ip_options) + size & 0xFFFF).to_bytes(2, "big")
        ip += (ident & 0xFFFF).to_bytes(2, "big") + bytes([0x40, 0, 64, 6])
        ip += (ones(ip, addresses, ip_options) ^ 0xFFFF).to_bytes(2, "big") + addresses + ip_options
    else:
        addresses = bytes.fromhex("fd990000000000000000000000000001fd990000000000000000000000000002")
        more = bytes([6, 0, 1, 4, 0, 0, 0, 0]) if extension else b""
        ip = bytes([0x60, 0, 0, 0]) + (len(more) + size & 0xFFFF).to_bytes(2, "big")
        ip += bytes([0 if more else 6, 64]) + addresses + more
    check = pseudo(addresses, size)
    if not blank:
        check = ones(head, bytes(2), b"\0\0", options, payload, *([] if len(payload) % 2 == 0 else [b"\0"]),
                     check.to_bytes(2, "big")) ^ 0xFFFF  # fmt: skip
    ethernet = macs + b"\x81\0\0\5" * tags + (b"\x08\0" if version == 4 else b"\x86\xdd")
    return ethernet + ip + head + check.to_bytes(2, "big") + bytes(2) + options + payload


def cut(version: int, payload: bytes, gso_size: int, *, flags: int = ACK, seq: int = 0xFFFFF000,
        ident: int = 0xFFFE, blank: bool = True, **same: object) -> list[bytes]:  # fmt: skip
    """The frames that tcp() of all of it is cut into."""
    pieces = [payload[k : k + gso_size] for k in range(0, len(payload), gso_size)] or [b""]
    frames = []
    for k, piece in enumerate(pieces):
        mine = flags if k == len(pieces) - 1 else flags & ~(FIN | PSH)
        mine = mine if k == 0 else mine & ~CWR
        where = {"seq": seq + k * gso_size, "ident": ident + k}
        frames.append(tcp(version, piece, flags=mine, blank=blank, **where, **same))  # type: ignore[arg-type]
    return frames
