"""Compiles ``kernels/`` into a shared library, once per source, torch version and processor.

Done at first use, or ahead with ``python -m trelm_ds.ops.build``. The library lies in
``$TRELM_CACHE`` (default ``~/.cache/trelm_ds``) under a name made of everything it depends on, so
it is never rebuilt in place. One process of a machine compiles while the others wait on a lock
that the kernel releases when its holder dies, so a killed build blocks nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "csrc"  # a link to kernels/ in a checkout, files in a wheel
BUILD_SECONDS = 20  # one core of a 2023 server

# at::vec chooses its instructions by these macros; they must match the flags beside them.
_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
}


class KernelBuildError(RuntimeError):
    """The kernels cannot be compiled here; the message is one line that says why."""


def find_compiler() -> list[str]:
    """The C++ compiler as an argument list: ``$CXX``, else c++, g++ or clang++.

    Raises:
        KernelBuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(candidate[0]):
            return candidate
    raise KernelBuildError(
        f"CXX is {named[0]!r}, which is not there" if named else "no C++ compiler found"
    )


def _flags() -> list[str]:
    torch_dir = Path(torch.__file__).parent
    vector = _VECTOR_FLAGS.get(
        torch.backends.cpu.get_cpu_capability(), ["-DCPU_CAPABILITY=DEFAULT"]
    )
    return [
        # No contraction into fused multiply-adds other than those written out: torch's own AdamW
        # is compiled so too, and results stay equal to it to the bit.
        *("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off", "-DNDEBUG"),
        *vector,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-DAT_PER_OPERATOR_HEADERS", f"-I{torch_dir / 'include'}"),
        *(f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def _sources() -> list[Path]:
    sources = sorted(p for p in SOURCE_DIR.glob("*") if p.suffix in (".cpp", ".h"))
    if not sources:
        raise KernelBuildError(f"the C++ sources are missing from {SOURCE_DIR}")
    return sources


def library_path() -> Path:
    """Where the library for this source, torch and processor lies once it is built."""
    digest = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), *_flags()):
        digest.update(part.encode() + b"\0")
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = Path(os.environ.get("TRELM_CACHE") or Path.home() / ".cache" / "trelm_ds")
    return cache / "kernels" / f"trelm-{digest.hexdigest()[:20]}.so"


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
    """Whether no one else is inside."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        except OSError:  # a file system without locks: build twice rather than not at all
            logger.debug("%s cannot be locked", path)
            alone = False
        yield alone


def build() -> Path:
    """The path of the built library, compiling it first if this machine has not done so yet.

    Raises:
        KernelBuildError: no compiler, no writable cache, or the compiler failed.
    """
    target = library_path()
    if target.exists():
        return target
    compiler = find_compiler()
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _exclusive(target.with_suffix(".lock")) as alone:
            if alone:  # without a lock they may be of a build that goes on
                for leftover in target.parent.glob(f"{target.stem}.*.tmp"):
                    leftover.unlink(missing_ok=True)
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise KernelBuildError(f"{error} (TRELM_CACHE names another folder)") from None
    return target


def _compile(compiler: list[str], target: Path) -> None:
    logger.warning("building kernels (about %d s, once)", BUILD_SECONDS)
    partial = target.with_suffix(f".{platform.node()}-{os.getpid()}.tmp")
    main = SOURCE_DIR / "register.cpp"
    try:
        result = subprocess.run(
            [*compiler, str(main), *_flags(), "-o", str(partial)], capture_output=True, text=True
        )
        if result.returncode != 0:
            errors = [line for line in result.stderr.splitlines() if "error" in line]
            reason = (errors or result.stderr.splitlines() or ["no message"])[0].strip()
            raise KernelBuildError(f"{compiler[0]} failed: {reason}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("kernels: %s", build())
    except KernelBuildError as build_error:
        raise SystemExit(f"kernels cannot be built: {build_error}") from None
