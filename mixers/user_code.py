"""A user's own mixers from outside the package: imports the file or module that registers them.

Only what a user names is imported, on the command line (`--import`) or by a study's runner; loading a spec never is.
May import nothing of hybridzoo but the schema's error.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from hybridzoo.mixers.schema import SpecError


def import_user_code(name: str) -> ModuleType:
    """Import a path that ends in .py, or a dotted module name, and return it; a second call finds what the first did.

    Raises: `SpecError` where there is no such file or module, and for whatever the module itself raises: the message
    has the name, the error's own words and, in a file, the line; the error is its cause.
    """
    return _import_file(name) if name.endswith(".py") else _import_module(name)


def _import_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise SpecError(f"{name}: no such file")
    if (known := _imported(path)) is not None:
        return known
    spec = importlib.util.spec_from_file_location(_free_name(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and type hints look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise _failed(f"{name}{_line(error, path)}", error) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error  # something that it imports is missing
        raise SpecError(
            f"{name}: Python finds no module '{error.name}'; a file of your own is a path that ends in .py"
        ) from None
    except Exception as error:
        raise _failed(name, error) from error


def _imported(path: Path) -> ModuleType | None:
    # By file, not by name: a script that runs a study is __main__ here and __mp_main__ in its workers.
    for module in list(sys.modules.values()):
        file = str(vars(module).get("__file__")) if hasattr(module, "__dict__") else ""
        if file.endswith(path.name) and Path(file).resolve() == path:
            return module
    return None


def _free_name(path: Path) -> str:
    """Return a module name made of the file's, and not taken by a file of that name in another folder."""
    stem = "user_code_" + re.sub(r"\W", "_", path.stem)
    name, number = stem, 2
    while name in sys.modules:
        name, number = f"{stem}_{number}", number + 1
    return name


def _failed(where: str, error: Exception) -> SpecError:
    return SpecError(f"{where}: {type(error).__name__}: {error}")


def _line(error: Exception, path: Path) -> str:
    """Return `:N`, the last line of the file that the error passed through; a syntax error says its own."""
    lines, step = [], error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f":{lines[-1]}" if lines else ""
