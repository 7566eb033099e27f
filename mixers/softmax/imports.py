"""What of the packages behind the backends can be imported here, and on what kind of GPU they would run.

Asked once a process; while a compiler traces, the answers are constants of its graph.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.torch_version import TorchVersion

from hybridzoo.mixers.extras import how_to_install


@torch.compiler.assume_constant_result
def import_refusal(module: str, attribute: str, package: str) -> str | None:
    """Why `attribute` of `module` cannot be had, or None; `package` is what would bring it."""
    return _import_refusal(module, attribute, package)


@functools.cache
def _import_refusal(module: str, attribute: str, package: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a package misses for other things than attention
            getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            return f"needs the package {package}, which is not installed: {how_to_install(package)}"
        return f"needs {module}, which cannot be imported ({error})"
    except AttributeError:  # the name may be another package's too
        return f"needs the package {package}, which is not installed: {how_to_install(package)}"
    except Exception as error:  # a package built for another torch or CUDA fails in ways of its own
        first = str(error).strip().partition("\n")[0]
        return f"needs {module}.{attribute}, which cannot be imported ({type(error).__name__}: {first})"
    return None


@torch.compiler.assume_constant_result
def version_refusal(package: str, oldest: str, why: str) -> str | None:
    """Why the installed `package` cannot be used, or None: `why` is what ails versions before `oldest`.

    A module without a distribution has no version, and is not refused.
    """
    return _version_refusal(package, oldest, why)


@functools.cache
def _version_refusal(package: str, oldest: str, why: str) -> str | None:
    found = installed(package)
    if found is None or not TorchVersion(found) < oldest:  # as packages' versions compare: b9 before b10
        return None
    return f"needs {package} {oldest} or later, got {found}, {why}: {how_to_install(package)}"


@torch.compiler.assume_constant_result
def device_refusal(kind: str, index: int | None, oldest: tuple[int, int]) -> str | None:
    """Why kernels for NVIDIA's GPUs of compute capability `oldest` or later cannot run on such a device, or None."""
    if kind != "cuda":
        return f"needs tensors on a CUDA device, got {kind}"
    if not torch.cuda.is_available():  # shapes are all that will be asked for
        return None
    if torch.version.hip is not None:
        return "is made for NVIDIA's GPUs"
    found = torch.cuda.get_device_capability(index)
    if found < oldest:
        return f"needs a GPU of compute capability {oldest[0]}.{oldest[1]} or later, got {found[0]}.{found[1]}"
    return None


@torch.compiler.assume_constant_result
def capability(index: int | None) -> int:
    """The major compute capability of a GPU, 0 where there is none."""
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else 0


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
