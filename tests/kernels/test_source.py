"""A digest of source changes with what the code does, and with nothing else."""

from __future__ import annotations

import pytest

from hybridzoo.kernels.source import effective_source, folder_digest, source_digest

PLAIN = (
    'def f(x):\n    y = x + 1\n    return f"{y}#no comment"\n\n\nclass A:\n    def g(self):\n        return "text"\n'
)
SAME = (
    '"""A module."""\n\n# what f does\ndef f(x):\n    """Add\n    one."""\n    y = x + 1  # one more\n\n'
    '    return f"{y}#no comment"\n\nclass A:\n    """Of no matter."""\n    def g(self):  \n        "also one"\n'
    '        return "text"\n'
)


def test_comments_docstrings_and_blank_lines_do_not_count():
    assert effective_source(SAME) == effective_source(PLAIN)
    assert source_digest([SAME]) == source_digest([PLAIN])


@pytest.mark.parametrize(
    ("old", "new"),
    [("x + 1", "x + 2"), ("#no comment", "#a comment"), ('"text"', '"other"'), ("x + 1\n", "x + 1\n    y += 1\n")],
)
def test_code_counts(old, new):
    assert source_digest([PLAIN]) != source_digest([PLAIN.replace(old, new)])


def test_what_stands_on_the_line_of_a_docstring_counts():
    assert effective_source('def f(): "said"; return 1\n') == effective_source('def f(): "said"; return 1\n')
    assert effective_source('def f(): "said"; return 1\n') != effective_source('def f(): "said"; return 2\n')


def test_a_folder_counts_names_and_contents(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "a.py").write_text(PLAIN)
    first = folder_digest(folder)
    (folder / "a.py").write_text(SAME)
    (folder / "notes.txt").write_text("not code")
    assert folder_digest(folder) == first
    (folder / "a.py").rename(folder / "b.py")
    assert folder_digest(folder) != first
