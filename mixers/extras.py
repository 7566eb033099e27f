"""Which extra brings a package that is not installed, and how to install it. Imports nothing.

hybridzoo is on no package index: extras are installed from a clone of its repository.
"""

from __future__ import annotations

EXTRAS = {
    "matplotlib": "study",
    "numpy": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "transformers": "hf",
    "ray": "ray",
    "flash-attn-4": "flash",
    "flash-attn": "flash2",
    "xformers": "xformers",
}
# Built against the torch that is there, which an isolated build would not see.
_AS_IT_IS = {"flash2"}


def how_to_install(package: str) -> str:
    """Return the command that brings a package of `EXTRAS`, and where to give it."""
    extra = EXTRAS[package]
    options = "--no-build-isolation " if extra in _AS_IT_IS else ""
    return f"pip install {options}-e '.[{extra}]' in a clone of hybridzoo"
