"""Shared fixtures: one thread per process, no network, the optional real data folder."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("TRELM_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "lama").is_dir():
        pytest.skip(f"real data not found at {folder}: set TRELM_DATA to the folder that holds it")
    return folder
