"""A cache on disk: its tensors as safetensors, and in the header what they belong to. cache.py has the cache.

Shapes: N rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybridzoo.architectures.cache import HybridCache, weights_digest
from hybridzoo.architectures.whole_file import remove_halves, whole_file
from hybridzoo.mixers.arguments import as_index
from hybridzoo.mixers.extras import how_to_install

if TYPE_CHECKING:
    from hybridzoo.architectures.model import HybridLM

VERSION = "2"
HEADER = ("version", "stack", "weights", "dtype", "lengths")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a cache's file needs the package safetensors, which is not installed: {how_to_install('safetensors')}",
            name=error.name,
        ) from error
    return safetensors


def save_cache(cache: HybridCache, path: str | Path, model: HybridLM) -> None:
    """Write `cache` of `model`, room that is not taken left out. The file replaces another only when it is whole.

    Raises: as `HybridCache.check` does for another model's cache, `RuntimeError` for one with rows that are lost,
    `ValueError` for one of no rows, and what a path that cannot be written raises.
    """
    save_file = _safetensors().torch.save_file
    cache.check(model, len(cache), cache.device)
    cache.check_rows()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a file")
    if not len(cache):
        raise ValueError(f"{path}: a cache of no rows has nothing to save")
    header = {
        "format": "hybridzoo cache",
        "version": VERSION,
        "stack": cache.model,
        "weights": weights_digest(model),
        "dtype": str(cache.dtype).removeprefix("torch."),
        "lengths": json.dumps(cache.lengths),
    }
    remove_halves(path)
    with whole_file(path) as half:
        save_file({name: x.contiguous() for name, x in cache.contents().items()}, str(half), header)


def load_cache(path: str | Path, model: HybridLM) -> HybridCache:
    """Read a cache for `model`, onto its device.

    Raises: `ValueError` that names the file where it is cut short, no cache, of another version, stack or weights, or
    without what it should hold; `TypeError` where the model is in another dtype; `FileNotFoundError`.
    """
    safetensors = _safetensors()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: " + ("a folder, not a file" if Path(path).is_dir() else "no such file"))
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: cut short, or not safetensors ({error})") from None
    if header.get("format") != "hybridzoo cache":
        raise ValueError(f"{path}: not a cache: HybridCache.save writes one")
    if missing := [name for name in HEADER if name not in header]:
        raise ValueError(f"{path}: a cache whose header has no {missing[0]!r}")
    if header["version"] != VERSION:
        raise ValueError(
            f"{path}: a cache of version {header['version']}; this is version {VERSION}, which reads its own"
        )
    if header["stack"] != model.fingerprint:
        raise ValueError(
            f"{path}: the cache of another model: of a stack {header['stack']}, and {model.spec.name} is "
            f"{model.fingerprint}"
        )
    held = str(model.dtype).removeprefix("torch.")
    if header["dtype"] != held:
        raise TypeError(f"{path}: a cache in {header['dtype']}, but the model is in {held}")
    if header["weights"] != weights_digest(model):
        raise ValueError(f"{path}: the cache of another model: of the same stack with other weights")
    lengths = _lengths(header["lengths"], path)
    cache = model.init_cache(len(lengths))
    cache.reserve(max(lengths, default=0))
    cache.advance(lengths)
    _fill(cache, tensors, path)
    return cache


def _lengths(text: str, path: str | Path) -> list[int]:
    """The tokens that each row has seen, as the header has them."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    lengths = [as_index(n) for n in found] if isinstance(found, list) else [None]
    whole = [n for n in lengths if n is not None and n >= 0]
    if len(whole) < len(lengths):
        raise ValueError(f"{path}: lengths must be a list of whole numbers, none below 0, is {text[:80]}")
    return whole


def _fill(cache: HybridCache, tensors: dict[str, Tensor], path: str | Path) -> None:
    held = cache.contents()  # keys and values were written without the rest of their last page
    if held.keys() != tensors.keys():
        odd = sorted(held.keys() ^ tensors.keys())
        raise ValueError(f"{path}: does not hold what the model's cache does, as '{odd[0]}'")
    for name, target in held.items():
        source = tensors[name]
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"{path}: '{name}' must be {_kind(target)}, is {_kind(source)}")
        if source.is_floating_point() and bool(torch.isnan(source).any()):
            raise ValueError(f"{path}: '{name}' holds values that are no numbers (NaN)")
        target.copy_(source)
    for layer in cache.layers:
        for part in layer:
            length = getattr(part.state, "length", None)
            if isinstance(length, Tensor) and length.tolist() != cache.lengths:
                raise ValueError(f"{path}: the header's lengths are {cache.lengths}, a layer's {length.tolist()}")


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
