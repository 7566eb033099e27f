"""`run("show", "carve-tiny")` runs the command in this process; `.stdout` and `.stderr` are kept apart."""

import pytest
from typer.testing import CliRunner

from hybridzoo.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words, ok=True, stdin=None):
        result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
        assert (result.exit_code == 0) == ok, result.output
        return result

    return run


TINY = """name: mine
d_model: 16
vocab_size: 256
mixers:
  c: {type: carve, n_heads: 2, head_dim: 8, content_chunk: 16, content_rank: 2}
  a: {type: attention, n_heads: 2}
layers: "c a"
ffn: {type: swiglu, width: 16}
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TINY)
    return path
