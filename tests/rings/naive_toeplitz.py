"""The naive twin of the Toeplitz hash."""

from __future__ import annotations


def toeplitz(key: bytes, data: bytes) -> int:
    """As netif.h says it in words: both are shift registers."""
    register = int.from_bytes(key.ljust(len(data) + 4, b"\0")[: len(data) + 4], "big")
    bits = len(data) * 8
    value = 0
    for k in range(bits):
        if data[k // 8] >> (7 - k % 8) & 1:
            value ^= register >> (bits - k) & 0xFFFFFFFF
    return value
