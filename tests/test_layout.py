"""The layout's rules, held: which folder may import which, how long a module may be, and what is on a user's path."""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "hybridzoo"

# Each may import the packages before it, never one after it.
ORDER = ["kernels", "mixers", "blocks", "architectures", "training", "studies", "cli"]
# What a layer may use from outside; a name that is missing here is a new dependency, and belongs in pyproject.toml too.
OUTSIDE = {
    "kernels": {"torch", "triton"},
    "mixers": {"torch", "einops", "flash_attn", "xformers"},
    "blocks": {"torch"},
    "architectures": {"torch", "omegaconf", "yaml", "transformers", "safetensors"},
    "training": {"torch", "omegaconf", "rich", "safetensors", "tensorboard"},
    "studies": {"torch", "numpy", "PIL", "omegaconf", "rich", "safetensors", "matplotlib", "ray", "yaml"},
    "cli": {"torch", "omegaconf", "rich", "safetensors", "typer", "click", "yaml"},
}
MODULES = sorted(path for folder in ORDER for path in (ROOT / folder).rglob("*.py"))
LONGEST = 500


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every (line, absolute dotted name) that a module imports, also inside functions and under TYPE_CHECKING."""
    here = ["hybridzoo", *path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield node.lineno, module
            if module == "hybridzoo" or not node.module:  # `from hybridzoo import kernels`
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_up_the_layers_and_never_down(path):
    layer = path.relative_to(ROOT).parts[0]
    allowed = {*ORDER[: ORDER.index(layer) + 1], "__version__"}
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "hybridzoo" and len(parts) > 1:
            assert parts[1] in allowed, f"{name_of(path)}:{line} imports {name}, which stands above {layer}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_layer_uses_only_the_libraries_that_are_meant_for_it(path):
    layer = path.relative_to(ROOT).parts[0]
    for line, name in imports_of(path):
        top = name.split(".")[0]
        known = top == "hybridzoo" or top in sys.stdlib_module_names or top in OUTSIDE[layer]
        assert known, f"{name_of(path)}:{line} imports {name}; {layer} may use {sorted(OUTSIDE[layer])}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_one_subject_and_so_stays_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{name_of(path)} has {lines} lines: split it by subject"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_opens_by_saying_what_lives_in_it(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("folder", [*ORDER, "yaml"])
def test_every_root_folder_is_linked_into_the_package(folder):
    link = PACKAGE / folder
    assert link.is_symlink(), f"{link} is not a symbolic link"
    assert os.readlink(link) == f"../../{folder}", "links must be relative: a clone can lie anywhere"
    assert link.resolve() == ROOT / folder


def test_the_package_holds_nothing_but_links():
    here = {entry.name for entry in PACKAGE.iterdir()} - {"__pycache__"}
    assert here == {"__init__.py", "__main__.py", "py.typed", *ORDER, "yaml"}


def test_yaml_holds_data_only():
    strangers = [p for p in (ROOT / "yaml").rglob("*") if p.is_file() and p.suffix not in {".yaml", ".md"}]
    assert not strangers


@pytest.mark.parametrize("name", [*ORDER, "yaml"])
def test_no_root_folder_is_a_package_of_its_own_on_the_path(name):
    spec = importlib.util.find_spec(name)  # PyYAML may well be there, and Hugging Face's `kernels` too
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    assert not [place for place in places if place and Path(place).resolve().is_relative_to(ROOT / name)]


def test_importing_the_package_loads_no_torch():
    code = "import sys, hybridzoo; print(hybridzoo.__version__, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[1] == "False"
