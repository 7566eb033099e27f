"""The digest of Python source by what it does: comments, docstrings and blank lines do not count.

Imports nothing of hybridzoo. Studies key results by it, so that no result is taken for that of other code; the record
of a check on a GPU holds it, so that a kernel changed since then is noticed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def effective_source(source: str) -> str:
    """Return Python `source` without comments, docstrings, blank lines and trailing space; the same on every Python.

    Raises: `SyntaxError` for text that is not Python.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            assert text.end_lineno is not None
            before = lines[text.lineno - 1].encode()[: text.col_offset].strip()
            after = lines[text.end_lineno - 1].encode()[text.end_col_offset :].strip()
            if not before and not after.startswith(b";"):  # else code stands on its line, and it stays
                lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1]:
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_digest(sources: Iterable[str]) -> str:
    """Return a hash of several pieces of Python source, in their order."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(effective_source(source).encode() + b"\0")
    return digest.hexdigest()


def folder_digest(*folders: Path) -> str:
    """Return a hash of every Python file below `folders`: their names and what they do."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder.parent).as_posix()
            digest.update(f"{name}\0{source_digest([path.read_text(encoding='utf-8')])}\0".encode())
    return digest.hexdigest()
