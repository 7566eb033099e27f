"""The command as a shell sees it: quick help, completion, codes and streams of real processes."""

import json
import os
import subprocess
import sys
import time

import pytest

from hybridzoo.studies.tasks import list_tasks

COMMAND = [sys.executable, "-P", "-c", "from hybridzoo.cli import app; app(prog_name='hybridzoo')"]


def shell(*words, **env):
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def test_help_and_version_load_no_torch():
    code = (
        "import sys\nfrom hybridzoo.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'hybridzoo.mixers' not in sys.modules"
    )
    for words in (["--help"], ["--version"], ["show", "--help"], ["study", "run", "--help"]):
        done = subprocess.run([sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_help_is_quick():
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        started = time.perf_counter()
        assert shell("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0  # loading torch alone takes longer


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("hybridzoo show carve-hybrid-t", {"carve-hybrid-tiny"}),
        ("hybridzoo study run quick", {"quickstart"}),
        ("hybridzoo tr", {"train"}),
        ("hybridzoo train carve-tiny --task ", set(list_tasks())),
    ],
)
def test_tab_completes_names(line, wanted):
    words = line.split(" ")
    env = {"_HYBRIDZOO_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    assert set(shell(**env).stdout.split()) == wanted


def test_data_on_stdout_is_pure_and_everything_else_is_on_stderr():
    good = shell("show", "carve-tiny", "--json", FORCE_COLOR="1")
    assert json.loads(good.stdout)["spec"]["name"] == "carve-tiny"
    bad = shell("show", "carve-tiny", "d_model=wide", "--json")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "d_model" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "hybridzoo", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout == shell("--help").stdout


def test_a_reader_that_stops_early_is_no_error():
    process = subprocess.Popen([*COMMAND, "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(60)
