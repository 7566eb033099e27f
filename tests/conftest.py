"""What every test may count on: no network, no screen, one thread a worker, and no root folder on the path."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each start a thread a core are slower than one alone
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# `python -m pytest` puts the current directory first, where kernels/ and yaml/ would pass for packages of those names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# The first example of a shape may compile or import something slow: time is not what these tests are about.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
