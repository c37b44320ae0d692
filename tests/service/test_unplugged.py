"""A disk that is detached while its guest has it mounted: it is served, by whichever process, until it is let go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.hostile_frontend import CLOSED, CLOSING, FLUSH, WRITE, Frontend, request
from tests.restart.bed import Bed
from tests.service.conftest import cli


def test_it_outlives_a_kill_and_an_upgrade(bed: Callable[..., Bed], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    b = bed()
    b.serve()
    front = Frontend(b.run_dir, b.dom0, str(image), memory_mib=4)
    ring = front.connect()
    data, (gref,) = front.page()

    def is_served(byte: int) -> None:
        data[:] = byte
        assert front.ask(ring, request(WRITE, [(gref, 0, 7)], sector=8), request(FLUSH, id=1)) == [0, 0]
        assert image.read_bytes()[4096:8192] == bytes([byte]) * 4096

    is_served(1)
    for key, value in (("online", 0), ("state", CLOSING)):  # as libxl does
        b.dom0.store.write(f"{front.back}/{key}", value)
    is_served(2)
    b.kill()
    b.serve()
    is_served(3)
    done = cli(b, "upgrade", timeout=200)
    assert (done.returncode, done.stderr) == (0, ""), (done, b.log.read_text())
    is_served(4)
    assert front.backend() == CLOSING
    front.say(CLOSED)
    front.wait(CLOSED)
    front.destroy()
