import json
import re

import pytest

from hybridzoo.architectures import account, list_specs, load_spec
from hybridzoo.mixers import list_mixers
from hybridzoo.mixers.softmax import BACKENDS
from hybridzoo.studies import list_studies, load_study, make_plan

SPECS = [name for name in list_specs() if name.endswith("tiny")]


def test_every_mixer_is_listed_with_the_defaults_of_its_flags(run):
    lines = {line.split()[0]: line.split() for line in run("list").stdout.splitlines() if line.split()}
    for entry in list_mixers():
        shown = lines[entry.name]
        for flag, word in entry.flags.items():
            if flag != "predict":
                assert str(word.default) in shown


def test_the_registry_as_data_says_all_there_is_to_know(run):
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    for entry in list_mixers():
        row = rows[entry.name]
        assert (row["source"], row["summary"], row["stable"]) == (entry.source, entry.summary, entry.stable)
        assert {name: word["choices"] for name, word in row["flags"].items()} == {
            name: list(word.choices) for name, word in entry.flags.items()
        }
        assert {name: word["meaning"] for name, word in row["words"].items()} == {
            name: word.meaning for name, word in entry.words.items()
        }


@pytest.mark.parametrize("entry", list_mixers(), ids=lambda entry: entry.name)
def test_one_mixer_is_shown_with_all_its_words(run, entry):
    out = run("list", entry.name).stdout
    assert entry.summary[:40] in out
    shown = " ".join(re.sub(r"[^\w ]", " ", out).split())
    for name, word in entry.words.items():
        assert name in out
        assert word.meaning.split()[0].strip(":,") in shown


def test_a_mixer_with_the_gates_of_another_is_told_apart_from_it(run):
    for words in (["list"], ["list", "carve-paper"]):
        assert "carve-paper is carve with conv_size=0, output_gate=none" in run(*words).stdout
    assert "carve is" not in run("list", "carve").stdout


def test_an_unknown_mixer_names_the_nearest(run):
    result = run("list", "carev", ok=False)
    assert result.exit_code == 2
    assert "did you mean 'carve'?" in result.stderr
    assert result.stdout == ""


def test_specs_and_studies_are_listed(run):
    rows = json.loads(run("list", "--specs", "--json").stdout)
    assert [(row["name"], row["pattern"]) for row in rows] == [(name, load_spec(name).pattern) for name in list_specs()]
    out = run("list", "--specs").stdout
    assert all(row["pattern"] in out for row in rows)


def test_studies_are_listed_with_what_they_are_about_and_what_they_train(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = json.loads(run("list", "--studies", "--json").stdout)
    assert rows == json.loads(run("study", "list", "--json").stdout)
    assert [row["name"] for row in rows] == list_studies()
    lines = {line.split()[0]: line for line in run("study", "list").stdout.splitlines() if line.split()}
    for row in rows:
        study = load_study(row["name"])
        listed = [stack.label for stack in make_plan(study).stacks]
        counts = [len(part) for part in (listed, study.tasks, study.seeds)]
        assert lines[row["name"]].split()[-3:] == [str(number) for number in counts]
        assert study.about in lines[row["name"]]
        assert row["stacks"] == listed


def test_a_mixer_with_words_is_listed_with_what_they_change(run):
    lines = {line.split()[0]: line for line in run("list", "carve[erase=token]").stdout.splitlines() if line.split()}
    assert re.match(r" *erase +token \(of itself content\)", lines["erase"])
    assert "of itself" not in lines["predict"]
    assert "unknown value 'tokn' (did you mean 'token'?)" in run("list", "carve[erase=tokn]", ok=False).stderr
    assert "unknown word 'eras' (did you mean 'erase'?)" in run("list", "carve[eras=token]", ok=False).stderr


def test_every_backend_is_listed_with_what_it_does_here_or_why_it_is_refused(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = json.loads(run("list", "--backends", "--json").stdout)
    out = run("list", "--backends").stdout
    assert [row["name"] for row in data["attention"]] == list(BACKENDS)
    for row in data["attention"]:
        assert set(row["versions"]) == set(BACKENDS[row["name"]].packages)
        for package, version in row["versions"].items():
            assert f"{package} {version or 'not installed'}" in out
        if row["inference"] is not None:
            assert f"refused: {row['inference']}"[:60] in out
    assert all(f"{name} for {case}" in out for case, name in data["auto"].items())
    assert set(data["recurrence"]) == {"triton", "torch", "reference"}
    assert data["serving"] == ("torch" if data["recurrence"]["triton"] else "triton")
    assert "one token a row by" in out


def test_two_questions_at_once_are_refused(run):
    assert run("list", "--backends", "--specs", ok=False).exit_code == 2
    assert run("list", "carve", "--specs", ok=False).exit_code == 2


@pytest.mark.parametrize("name", SPECS)
def test_a_stack_is_shown_layer_by_layer(run, name):
    spec = load_spec(name)
    lines = run("show", name).stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["layer", "mixers"])
    rows = [line.split()[:2] for line in lines[head + 2 : head + 2 + len(spec.layers)]]
    assert rows == [[str(i), layer.label] for i, layer in enumerate(spec.layers)]
    assert f"({account(spec).parameters:,})" in "".join(lines)


def test_every_flag_of_every_mixer_is_shown(run):
    out = run("show", "carve-hybrid-tiny", "mixers.c.erase=token").stdout
    assert "carve[decay=channel,erase=token,correct=tied,write=scalar,predict=stored]" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba2-tiny", "n_heads=8 head_dim=64 expand=2 state_dim=64 norm_groups=1"),
        ("carve-tiny", "n_heads=4 n_v_heads=4 head_dim=64 head_v_dim=64 decay_rank=64"),
        ("transformer-tiny", "attention n_heads=4 n_kv_heads=4 head_dim=64"),
    ],
)
def test_sizes_that_follow_from_others_are_shown_as_numbers(run, name, words):
    assert words in run("show", name).stdout


@pytest.mark.parametrize("columns", [80, 100])
def test_a_long_layer_is_folded_between_its_words(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    pattern = "carve[n_heads=2,head_dim=16,write=one,erase=token]+a+gla[n_heads=2]"
    lines = run("show", "carve-hybrid-tiny", f"layers={pattern} c").stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["layer", "mixers"])
    last = next(i for i, line in enumerate(lines) if line.split()[:1] == ["all"])
    assert max(len(line) for line in lines[head - 1 : last + 1]) <= columns
    folded = []
    for line in lines[head + 2 :]:
        if line.startswith("     1"):
            break
        folded.append(line[7:].split("   ")[0].strip())
    assert "".join("".join(folded).split()) == pattern
    assert all(line.endswith((",", "+")) for line in folded[:-1]), folded


def test_a_setting_that_is_known_to_diverge_is_marked(run):
    assert "unstable" in run("show", "carve-tiny", "mixers.c.qk_norm=none").stdout
    assert "unstable" not in run("show", "carve-tiny").stdout


def test_the_cost_as_data_is_the_account_at_that_context(run):
    data = json.loads(run("show", "carve-hybrid-tiny", "layers=(c*7 a)", "--context", "1000", "--json").stdout)
    cost = account(load_spec("carve-hybrid-tiny", ["layers=(c*7 a)"]), context=1000)
    assert data["account"]["kv_bytes"] == cost.kv_bytes > 0
    assert data["account"]["context"] == 1000
    assert len(data["account"]["layers"]) == 8
    assert data["spec"]["layers"] == "(c*7 a)"


def test_a_spec_of_few_tokens_is_counted_at_those_it_takes(run):
    assert "one sequence of 512 tokens" in run("show", "carve-tiny", "max_context=512").stdout
    assert "one sequence of 4,096 tokens" in run("show", "carve-tiny", "max_context=8192").stdout
    result = run("show", "carve-tiny", "max_context=512", "--context", "513", ok=False)
    assert result.exit_code == 2
    assert "--context 513 is over the spec's max_context 512" in result.stderr


def test_a_file_of_ones_own_is_shown(run, tiny):
    assert "mine: 2 layers" in run("show", "mine.yaml").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["carve-hybrid-tyny"], "did you mean 'carve-hybrid-tiny'?"),
        (["carve-hybrid-tiny", "mixers.c.erase=tokn"], "did you mean 'token'?"),
        (["carve-hybrid-tiny", "layers=(c a"], "never closed"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["quickstart"], "'quickstart' is a study, which has several stacks: use `hybridzoo study run quickstart`"),
        (["carve-hybrid-tiny", "--context", "0"], "--context"),
    ],
)
def test_a_mistake_is_an_error_that_says_what_was_meant(run, words, said):
    result = run("show", *words, ok=False)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
