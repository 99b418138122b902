"""The build of the kernels: cached, locked, survivable, and optional. With stand-in compilers."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trelm_ds.ops import build, load_kernels
from trelm_ds.ops.build import KernelBuildError

COMPILER = """#!/bin/sh
echo run >> "{log}"
{body}
while [ "$1" != "-o" ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a stand-in compiler into $CXX, an empty cache into $TRELM_CACHE."""
    log = tmp_path / "log"
    monkeypatch.setenv("TRELM_CACHE", str(tmp_path / "cache"))

    def install(body: str = "") -> Path:
        script = tmp_path / "compiler"
        script.write_text(COMPILER.format(log=log, body=body))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return install


def _files(folder: Path) -> list[str]:
    return sorted(p.suffix for p in folder.iterdir())


def test_builds_once(compiler, caplog):
    log = compiler()
    target = build.build()
    assert build.build() == target and target.read_text() == "library\n"
    assert log.read_text() == "run\n"
    assert _files(target.parent) == [".lock", ".so"]
    assert [r.message for r in caplog.records] == ["building kernels (about 20 s, once)"]


def test_processes_that_start_together_build_once(compiler):
    log = compiler("sleep 0.3")
    threads = [threading.Thread(target=build.build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text() == "run\n"


def test_a_killed_build_blocks_nobody(compiler, repo):
    log = compiler("sleep 60")
    victim = subprocess.Popen(
        [sys.executable, "-m", "trelm_ds.ops.build"], cwd=repo, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert log.exists()
        victim.kill()
        victim.wait()
        target = build.library_path()
        leftover = target.with_suffix(".otherhost-1.tmp")
        leftover.write_text("half a library")
        # the compiler of the killed build still runs: its being alive must not hold the lock
        compiler()
        started = time.monotonic()
        assert build.build().read_text() == "library\n"
        assert time.monotonic() - started < 10
        assert not leftover.exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_build_killed_half_way_is_built_again_and_loads(tmp_path, repo):
    """The real compiler, its whole process group killed while it runs."""
    build.find_compiler()
    environment = os.environ | {"TRELM_CACHE": str(tmp_path)}
    victim = subprocess.Popen(
        [sys.executable, "-m", "trelm_ds.ops.build"],
        cwd=repo, env=environment, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("kernels/*.lock")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # the compiler is at work
    os.killpg(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("kernels/*.so"))
    check = (
        "import torch; from trelm_ds import ops; assert ops.load_kernels(); "
        "assert ops.select_paths(torch.tensor([1.0, 3.0, 2.0]), 2).tolist() == [1, 2]"
    )
    environment.pop("TRELM_KERNELS", None)
    subprocess.run(
        [sys.executable, "-c", check], cwd=repo, env=environment, check=True, timeout=240
    )
    assert _files(tmp_path / "kernels") == [".lock", ".so"]


def test_a_failing_compiler_is_named_and_leaves_nothing(compiler):
    compiler("echo 'x.h:1: error: no such thing' >&2; exit 1")
    with pytest.raises(KernelBuildError, match="compiler failed: x.h:1: error: no such thing"):
        build.build()
    assert _files(build.library_path().parent) == [".lock"]


def test_no_compiler_and_no_cache(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    with pytest.raises(KernelBuildError, match="no-such-compiler"):
        build.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelBuildError, match="no C\\+\\+ compiler found"):
        build.build()
    compiler()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRELM_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelBuildError, match="TRELM_CACHE names another folder"):
        build.build()


def test_the_name_depends_on_source_and_processor(tmp_path, monkeypatch):
    name = build.library_path().name
    changed = tmp_path / "csrc"
    changed.mkdir()
    for source in build.SOURCE_DIR.glob("*.*"):
        (changed / source.name).write_text(source.read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(build, "SOURCE_DIR", changed)
        assert build.library_path().name != name
    with monkeypatch.context() as patch:
        patch.setattr(build, "SOURCE_DIR", tmp_path / "nowhere")
        with pytest.raises(KernelBuildError, match="sources are missing"):
            build.library_path()
    monkeypatch.setattr(build.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert build.library_path().name != name


WITHOUT_COMPILER = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from trelm_ds.ops import select_paths, path_weight_grad
for _ in range(2):
    assert select_paths(torch.tensor([1.0, 3.0, 2.0]), 2).tolist() == [1, 2]
assert path_weight_grad(torch.ones(2, 3), torch.ones(2, 1), torch.tensor([1])).tolist() == [
    [0.0], [2.0], [0.0]]
"""


def test_without_a_compiler_it_says_once_what_that_costs(tmp_path, repo):
    environment = os.environ | {"TRELM_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    environment.pop("TRELM_KERNELS", None)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        capture_output=True, text=True, cwd=repo, env=environment, check=True,
    )  # fmt: skip
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "no-such-compiler" in warnings[0] and "30 times as long" in warnings[0]


def test_the_reference_can_be_asked_for(compiler, monkeypatch):
    log = compiler()
    monkeypatch.setenv("TRELM_KERNELS", "0")
    assert load_kernels.__wrapped__() is False
    assert not log.exists()
