"""A user's own code: imported once by the name it was given, and named, with its own error, where it fails."""

import subprocess
import sys
from pathlib import Path

import pytest
from own_code import OWN, forgotten

from hybridzoo.mixers import SpecError, build_mixer, get_entry
from hybridzoo.mixers.user_code import import_user_code


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with forgotten():
        yield


def test_a_file_brings_the_mixers_that_it_registers():
    Path("my-own.py").write_text(OWN.format(name="mine"))
    import_user_code("my-own.py")
    mixer = build_mixer("mine[turns=4]", d_model=8, n_heads=1)
    assert mixer.config.turns == 4
    assert sys.modules[type(mixer).__module__].Own is type(mixer)


def test_a_module_is_brought_by_its_dotted_name(monkeypatch):
    Path("parcel").mkdir()
    Path("parcel/inner.py").write_text(OWN.format(name="mine"))
    monkeypatch.syspath_prepend(".")
    import_user_code("parcel.inner")
    import_user_code("parcel.inner")
    import_user_code("parcel/inner.py")  # the same file, so nothing is registered twice
    assert build_mixer("mine", d_model=8, n_heads=1).config.turns == 3


def test_one_file_is_imported_once_whatever_path_leads_to_it(tmp_path):
    Path("own.py").write_text(OWN.format(name="mine"))
    Path("link").symlink_to(".")
    for name in ("own.py", "./own.py", str(tmp_path / "own.py"), "link/own.py"):
        import_user_code(name)


def test_files_of_one_name_in_two_folders_are_two_modules():
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "own.py").write_text(OWN.format(name=f"mine_{folder}"))
        import_user_code(f"{folder}/own.py")
    one, two = (get_entry(f"mine_{folder}").cls for folder in "ab")
    assert one.__module__ != two.__module__


def test_a_script_that_names_itself_registers_nothing_twice():
    script = OWN.format(name="mine") + "\nfrom hybridzoo.mixers.user_code import import_user_code\n"
    Path("script.py").write_text(script + "import_user_code(__file__)\n")
    done = subprocess.run([sys.executable, "-P", "script.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", r"^nowhere\.py: no such file$"),
        ("nowhere", r"^nowhere: Python finds no module 'nowhere'; a file of your own is a path that ends in \.py$"),
        ("json.nowhere", r"^json\.nowhere: Python finds no module 'json\.nowhere'"),
    ],
)
def test_what_is_not_there_is_said_so(name, said):
    with pytest.raises(SpecError, match=said):
        import_user_code(name)


@pytest.mark.parametrize(
    ("code", "line", "said"),
    [
        ("\nimport math\nmath.sqrt(-1)\n", ":3", "ValueError: "),
        ("import nowhere_at_all\n", ":1", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(:\n", "", "SyntaxError: .*line 1"),
        (OWN.format(name="carve"), ":8", "ValueError: mixer name 'carve' is taken by Carve"),
    ],
)
def test_what_fails_inside_is_named_with_its_own_error(monkeypatch, code, line, said):
    Path("own.py").write_text(code)
    monkeypatch.syspath_prepend(".")
    for name, place in (("own.py", f"own.py{line}"), ("own", "own")):
        with pytest.raises(SpecError, match=f"^{place}: {said}") as raised:
            import_user_code(name)
        assert raised.value.__cause__ is not None, "a traceback shows where it rose"
