"""What a user gets: archives that hold real files, and a wheel that works where the repository is not."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["kernels", "mixers", "blocks", "architectures", "training", "studies", "cli", "yaml"]

pytestmark = pytest.mark.xdist_group("packaging")  # one worker: the archives are built once


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources(suffixes: set[str]) -> set[str]:
    """Paths inside the package of every source file that the root folders hold."""
    found = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist, and the wheel built from that sdist, as an index would get them; made from a copy of the sources."""
    copy = tmp_path_factory.mktemp("checkout") / "repo"
    copy.mkdir()
    clutter = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in [*FOLDERS, "src"]:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=clutter)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy / name)
    run(sys.executable, "-P", "-m", "build", "--no-isolation", cwd=copy)
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    (wheel,) = (copy / "dist").glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_every_source_file_and_all_data(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    wanted = {f"hybridzoo/{name}" for name in sources({".py", ".yaml"})} | {"hybridzoo/py.typed"}
    assert wanted <= names
    strangers = {name.split("/")[0] for name in names if ".dist-info" not in name} - {"hybridzoo"}
    assert not strangers, "nothing but hybridzoo may land in a user's site-packages"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_files_and_no_links(archives):
    with tarfile.open(archives[0]) as sdist:
        members = sdist.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.split("/", 1)[-1] for member in members if member.isfile()}
    assert {f"src/hybridzoo/{name}" for name in sources({".py", ".yaml"})} <= names


@pytest.fixture(scope="module")
def elsewhere(archives, tmp_path_factory):
    """The Python of a new environment that has our wheel, and of this one's packages only what it depends on."""
    place = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=place)
    (site,) = (place / "env" / "lib").glob("python3*/site-packages")
    command = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site, archives[1]]
    run(sys.executable, "-P", "-m", "pip", *command, cwd=place)
    # Nothing is downloaded: torch and the other dependencies are found where this environment has them, after our own.
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return place, place / "env" / "bin" / "python"


def test_an_installed_wheel_works_where_the_repository_is_not(elsewhere):
    place, python = elsewhere
    code = """
        import json, hybridzoo, hybridzoo.kernels, hybridzoo.mixers, hybridzoo.studies, hybridzoo.cli
        from hybridzoo.architectures import account, build_model, list_specs, load_spec
        spec = load_spec("carve-hybrid-tiny")
        model = build_model(spec, device="meta")
        counted = sum(p.numel() for p in model.parameters())
        print(json.dumps([hybridzoo.__file__, list_specs(), counted, account(spec).parameters]))
    """
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    file, specs, counted, accounted = json.loads(run(python, "-P", "-c", lines, cwd=place, PYTHONPATH=""))
    assert Path(file).is_relative_to(place)
    assert "carve-hybrid-tiny" in specs
    assert counted == accounted


def test_an_installed_wheel_brings_the_command(elsewhere):
    place, python = elsewhere
    out = run(python, "-P", "-c", "from hybridzoo.cli import app; app(['--version'])", cwd=place, PYTHONPATH="")
    assert out.startswith("hybridzoo ")


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="a group is kept in one worker: needs `pytest -n 2`"
)
def test_the_scheduler_knows_of_groups(request):
    # It reads them off names; where a pytest has none there, archives and interpreters are made once a worker.
    assert request.node.nodeid.endswith("@packaging")
