"""`hybridzoo study theory`: all probes once, as text and as data, and what it refuses."""

import json

import pytest

from hybridzoo.studies.theory import list_probes

NAMES = [probe.name for probe in list_probes()]


def test_all_probes_run_small_and_leave_their_files(run, tmp_path):
    text = run("study", "theory", "--small", "--device", "cpu", "--out", "t").stdout
    data = json.loads((tmp_path / "t" / "theory.json").read_text())
    assert [probe["name"] for probe in data["probes"]] == NAMES
    verdicts = {probe["name"]: probe["verdict"] for probe in data["probes"]}
    for name in ("capacity", "stability", "separation", "boundary"):  # by counterexample, at any size
        assert verdicts[name] == "does not hold as printed"
    assert verdicts["gradient"] == "does not hold as we read it"
    assert verdicts["optimality"] == "cannot be told"
    for probe in data["probes"]:
        assert probe["claim"]
        assert probe["finding"]
        assert (tmp_path / "t" / probe["figure"]).is_file()
        for table in probe["tables"].values():
            assert len((tmp_path / "t" / table).read_text().splitlines()) > 1
        assert probe["title"] in text
    assert "all numbers: t" in text


def test_json_is_the_file_and_nothing_else(run, tmp_path):
    printed = json.loads(run("study", "theory", "capacity", "--small", "--json").stdout)
    assert printed == json.loads((tmp_path / "runs" / "theory" / "theory.json").read_text())
    assert [probe["name"] for probe in printed["probes"]] == ["capacity"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("capacty",), "unknown probe 'capacty' (did you mean 'capacity'?)"),
        (("--small", "--full"), "exclude each other"),
        (("optimality", "--study", "nowhere"), "nowhere"),
        (("capacity", "--device", "cudda"), "unknown device 'cudda' (did you mean 'cuda'?)"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(run, tmp_path, words, said):
    result = run("study", "theory", *words, ok=False)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("study", "theory", "capacity", "--small", "--device", "cuda", ok=False)
    assert result.exit_code == 2
    assert "torch sees no GPU here" in result.stderr
    assert not (tmp_path / "runs").exists()
