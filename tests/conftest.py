"""What every test may count on: no network, no screen, one thread a worker, and no root folder on the path."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each start a thread a core are slower than one alone
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started in the background of a script, this process would ignore the interrupts that tests send to it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `python -m pytest` puts the current directory first, where kernels/ and yaml/ would pass for packages of those names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Every run gives the same examples, so that a failing change is to blame; `--hypothesis-profile=explore` draws others.
# The first example of a shape may compile or import something slow: time is not what these tests are about.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("same", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="where to write what the GPU's tests found, with device and versions")


class _Record:
    """Gathers the errors that tests report of the kernels, and writes them with what failed.

    What an earlier run found of the same kernels stays, unless it was found anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = {}
        self.failed: set[str] = set()
        self.written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if time.monotonic() > self.written + 20:  # a run may be killed
            self.write()
        name = report.nodeid.partition("tests/")[2]
        if report.failed:
            self.failed.add(name)
        elif report.when == "call" and report.passed:
            errors = dict(report.user_properties).get("errors", {})
            self.found[name] = {n: float(f"{x:.1e}") for n, x in errors.items()}

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        if not self.found:
            return
        from importlib.metadata import version

        import torch
        from kernel_digests import kernel_digests

        from hybridzoo.studies.environment import environment

        device = "cuda" if torch.cuda.is_available() else "cpu"
        made = {**environment(device), "triton": version("triton")}
        digests = kernel_digests()
        passed, failed = self.found, self.failed
        if self.path.exists() and (before := json.loads(self.path.read_text(encoding="utf-8")))["kernels"] == digests:
            passed = {**before["passed"], **passed}
            failed = failed | set(before["failed"])
        passed = {name: errors for name, errors in sorted(passed.items()) if name not in self.failed}
        result = {"environment": made, "kernels": digests, "failed": sorted(failed - set(self.found)), "passed": passed}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):  # the process that hears of every test
        config.pluginmanager.register(_Record(path))
