"""What every test shares: no network, no window, one seed, and the way to the repository and to real scans."""

import os
import random
import sys
from pathlib import Path

import pytest

# Before any library reads them. A test that wants something from a hub fails at once instead of waiting for a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state, whatever ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:  # a test that uses neither does not pay for their import
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout, for tests that run its scripts and commands."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real scans and reports that may not be in the repository; without it, its tests are skipped."""
    folder = os.environ.get("MED3DVLM_SHARED_DATA")
    if not folder:
        pytest.skip("MED3DVLM_SHARED_DATA does not name a folder of real scans")
    return Path(folder)
