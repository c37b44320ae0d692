"""How kernels are cached: never stale, and never from a directory that somebody else can write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rings import jit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.jit_only("without the JIT there is no cache")
def test_an_edited_helper_is_never_served_from_the_cache(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rings", tmp_path / "rings", ignore=shutil.ignore_patterns("__pycache__"))
    low, high = tmp_path / "rings" / "low.py", tmp_path / "rings" / "high.py"
    high.write_text(
        "from .jit import kernel\nfrom .low import allowed\n\n\n@kernel\ndef check(n):\n    return allowed(n)\n"
    )
    code = "from rings.high import check; print(check(200), sum(check.stats.cache_hits.values()))"
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PVDRIVERS_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    helper = "from .jit import inline\n\n\n@inline\ndef allowed(n):\n    return n < {}\n"
    low.write_text(helper.format(11))
    assert run() == "False 0"
    assert run() == "False 1", "the second start compiles nothing"
    # Same length, same time: nothing but its content tells that it is another.
    before = high.stat().st_mtime_ns
    stamp = low.stat()
    low.write_text(helper.format(11).replace("n < 11", "n > 11"))
    os.utime(low, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert high.stat().st_mtime_ns == before
    assert run() == "True 0"
    assert run() == "True 1"


def refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PVDRIVERS_CACHE_DIR", str(path))
    with pytest.raises(jit.CacheDirError) as caught:
        jit.cache_dir()
    return str(caught.value)


def test_a_new_directory_is_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVDRIVERS_CACHE_DIR", str(tmp_path / "a" / "b"))
    made = jit.cache_dir()
    assert made.parent == tmp_path / "a" / "b"
    assert [p.stat().st_mode & 0o777 for p in (made, made.parent)] == [0o700, 0o700]
    assert jit.cache_dir() == made


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o777, 0o1777])
def test_a_directory_that_others_can_write(mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    path.chmod(mode)
    assert f"cache directory {path}: owner {os.geteuid()}, mode {mode:04o}" in refused(path, monkeypatch)
    path.chmod(0o700)
    (jit.cache_dir()).chmod(mode)  # nor one inside of it
    assert "writable by nobody else" in refused(path, monkeypatch)


def test_a_directory_that_others_can_put_another_in_place_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o777)
    assert f"everybody can rename what is in {above}" in refused(above / "cache", monkeypatch)
    above.chmod(0o1777)
    assert jit.cache_dir().parent == above / "cache"


def test_a_link_or_a_file_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert "cache directory" in refused(tmp_path / "link", monkeypatch)
    (tmp_path / "file").write_text("")
    assert "PVDRIVERS_CACHE_DIR" in refused(tmp_path / "file", monkeypatch)


@pytest.mark.root
def test_a_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)
    assert "owner 12345" in refused(path, monkeypatch)


def test_refused_already_at_import(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    path.chmod(0o777)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    environment |= {"PVDRIVERS_CACHE_DIR": str(path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "import rings.ring"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "CacheDirError" in done.stderr
    assert list(path.iterdir()) == []


def test_one_import_of_the_wire_is_quick() -> None:
    code = "import rings.ring, time; t = time.perf_counter(); import rings.blkif; print(time.perf_counter() - t)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 1.0  # 0.03 s on a quiet machine; this only says that nothing is compiled
