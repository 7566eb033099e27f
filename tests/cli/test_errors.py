"""Whatever goes wrong ends as one readable message on stderr and an exit code that says whose fault it was."""

import re
import tomllib
from pathlib import Path

import pytest
import typer

from hybridzoo.cli.output import BAD_INPUT, FAILED, INTERRUPTED, command
from hybridzoo.mixers import SpecError
from hybridzoo.mixers.extras import EXTRAS, how_to_install


def outcome(error, capsys):
    @command
    def run() -> None:
        raise error

    with pytest.raises(typer.Exit) as raised:
        run()
    out, err = capsys.readouterr()
    assert out == "", "stdout is for results"
    return raised.value.exit_code, err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SpecError("a.yaml: d_model: [wide] is no integer"), BAD_INPUT, "error: a.yaml: d_model: [wide] is no integer"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), BAD_INPUT, "a.yaml: No such file"),
        (
            ModuleNotFoundError("no", name="matplotlib.pyplot"),
            BAD_INPUT,
            "pip install -e '.[study]' in a clone of hybridzoo",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), FAILED, "No module named 'x'"),
        (RuntimeError("out of patience"), FAILED, "RuntimeError: out of patience"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
def test_an_exception_becomes_a_message_and_a_code(error, code, said, capsys):
    got, err = outcome(error, capsys)
    assert got == code
    assert said in err
    assert "Traceback" not in err


def test_every_extra_that_an_error_names_brings_its_package():
    extras = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        brought = [re.split(r"[>=;]", line)[0] for line in extras["optional-dependencies"][extra]]
        assert package in brought
        assert f"'.[{extra}]'" in how_to_install(package)


def test_a_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("HYBRIDZOO_TRACEBACK", "1")
    _, err = outcome(RuntimeError("out of patience"), capsys)
    assert "Traceback" in err
    assert "test_errors.py" in err


def test_an_unforeseen_error_says_how_to_see_more(capsys):
    assert "HYBRIDZOO_TRACEBACK=1" in outcome(ZeroDivisionError("division by zero"), capsys)[1]


def test_a_divergence_is_told_as_the_trainer_tells_it(capsys):
    from hybridzoo.training import DivergedError

    code, err = outcome(DivergedError("step 3 of 9: the loss is nan", 3), capsys)
    assert code == FAILED
    assert err == "error: step 3 of 9: the loss is nan\n"
