"""A study file is data, strictly checked: every mistake names its file, its key, and the nearest valid choice."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from hybridzoo.mixers import SpecError
from hybridzoo.studies import list_studies, load_study, make_plan, study_from, study_path

# What the README's picture was drawn from.
RECORDED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "quickstart"

MINIMAL = {
    "name": "small",
    "spec": {
        "d_model": 16,
        "mixers": {"a": {"type": "attention", "n_heads": 2}, "c": {"type": "carve", "n_heads": 2, "head_dim": 8}},
        "layers": "a*2",
        "ffn": {"type": "swiglu", "width": 16},
    },
    "tasks": {"recall": {"type": "mqar", "pairs": 2, "keys": 8, "values": 8, "train": {"steps": 2}}},
}


def changed(**keys):
    return {**MINIMAL, **keys}


@pytest.mark.parametrize("name", list_studies())
def test_a_shipped_study_loads_and_plans_within_its_budget(name):
    study = load_study(name)
    plan = make_plan(study)
    assert study.name == name
    assert study.about
    assert not plan.excluded
    assert len(plan.trials) == len(plan.stacks) * len(study.tasks) * len(study.seeds)


def test_the_quickstart_is_what_the_readme_promises():
    plan = make_plan(load_study("quickstart"))
    shares = {stack.attention for stack in plan.stacks}
    assert len(plan.stacks) >= 5
    assert {0.0, 1.0} < shares
    assert {"carve", "carve[erase=token]", "gdn2"} <= {stack.family for stack in plan.stacks}
    assert len(plan.study["seeds"]) == 2
    assert set(plan.shown) == {"recall", "text"}
    for task in plan.shown:
        counts = [stack.parameters[task] for stack in plan.stacks]
        assert max(counts) / min(counts) < 1.02


def test_the_recorded_quickstart_is_of_these_stacks_and_separates_them():
    with open(RECORDED / "stacks.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    plan = make_plan(load_study("quickstart"))
    planned = {(task, stack.label): stack.parameters[task] for task in plan.shown for stack in plan.stacks}
    assert {(row["task"], row["stack"]): int(row["parameters"]) for row in rows} == planned
    recall = [row for row in rows if row["task"] == "recall"]
    assert all(row["seeds"] == "2" for row in rows)
    assert any(float(row["least"]) > 0.9 for row in recall)
    assert any(float(row["most"]) < 0.6 for row in recall)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(stackz={}), r"mine\.yaml: unknown key 'stackz'.*did you mean 'stacks'\?"),
        (
            changed(seeds=[0, 0]),
            r"mine\.yaml: seeds: must be distinct, from 0 to 9,223,372,036,854,775,807, got \[0, 0\]",
        ),
        (changed(seeds=[-1]), r"mine\.yaml: seeds: must be distinct, from 0 to 9,223"),
        (changed(seeds=[]), r"mine\.yaml: seeds: a study needs at least one"),
        (changed(tasks={}), r"mine\.yaml: tasks: a study needs at least one"),
        (changed(context=0), r"mine\.yaml: context: must be at least 1, got 0"),
        (changed(hold={"parms": 10}), r"mine\.yaml: hold.*'parms'.*did you mean 'params'\?"),
        (changed(hold={"train_flops": "smallest"}), r"mine\.yaml: hold\.train_flops.*got 'smallest'"),
        (changed(hold={"inference_bytes": -1}), r"mine\.yaml: hold\.inference_bytes: must be at least 1, got -1"),
        (changed(hold={"params": "larges"}), r"mine\.yaml: hold\.params.*larges"),
        (changed(hold={"params": 0}), r"mine\.yaml: hold\.params: must be at least 1, got 0"),
        (changed(hold={"tolerance": 2}), r"mine\.yaml: hold\.tolerance: must be a share between 0 and 1, got 2"),
        (changed(axes={"d_model": []}), r"mine\.yaml: axes\.d_model: an axis needs at least one value"),
        (
            changed(axes={"d_model": [8, 16, 8]}),
            r"mine\.yaml: axes\.d_model: its values must be distinct, and 8 stands",
        ),
        (
            changed(axes={"tie_embeddings": [None, None]}),
            r"mine\.yaml: axes\.tie_embeddings: .*null stands there twice",
        ),
        (changed(axes={"ratio": ["1/4", 0, 0.25]}), r"mine\.yaml: axes\.ratio: .* 1/4 and 0\.25 are the same"),
        (
            changed(name="../../esc"),
            r"mine\.yaml: name: '\.\./\.\./esc' is also the folder of the results: at most 100",
        ),
        (changed(name="-x"), r"mine\.yaml: name: '-x'"),
        (changed(name=".x"), r"mine\.yaml: name: '\.x'"),
        (changed(name="x" * 101), r"mine\.yaml: name: "),
        (changed(name="x\n"), r"mine\.yaml: name: "),
        (changed(train={"stepz": 3}), r"mine\.yaml: train.*'stepz'.*did you mean 'steps'\?"),
        (changed(train={"lr": -1}), r"mine\.yaml: train\.lr: must be a finite number above 0, got -1"),
        (changed(train={"seed": 3}), r"mine\.yaml: train\.seed: the seeds are the study's own"),
        (changed(tasks={"r": {"type": "mqarr"}}), r"mine\.yaml: tasks\.r\.type.*'mqarr'.*did you mean 'mqar'\?"),
        (changed(tasks={"r": {"pairs": 3}}), r"mine\.yaml: tasks\.r: missing .type.; known tasks: .*mqar"),
        (changed(tasks={"r": {"type": "mqar", "pears": 3}}), r"mine\.yaml: tasks\.r.*'pears'.*did you mean 'pairs'\?"),
        (changed(tasks={"r": {"type": "mqar", "pairs": 99}}), r"mine\.yaml: tasks\.r\.pairs: 99 pairs need as many"),
        (changed(tasks={"r": {"type": "mqar", "train": 3}}), r"mine\.yaml: tasks\.r\.train: expected a mapping"),
        (
            changed(tasks={"r": {"type": "mqar", "train": {"betas": [0.9, 2.0]}}}),
            r"mine\.yaml: tasks\.r\.train\.betas: each must be in \[0, 1\), got 2\.0",
        ),
        (
            changed(stacks={"one": {"layers": "a"}}, axes={"layers": ["a", "c"]}),
            r"mine\.yaml: stacks\.one\.layers: is also an axis",
        ),
        ({"name": "x", "spec": "carve-tiny"}, r"mine\.yaml: missing.*tasks"),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_nearest_choice(data, message):
    with pytest.raises(SpecError, match=message):
        study_from(data, "mine.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(stacks={"one": {"layers": "b*2"}}), r"mine\.yaml: stacks\.one\..*layers.*'b'"),
        (changed(stacks={"one": {"mixers.c.erase": "tokn"}}), r"mine\.yaml: stacks\.one\..*did you mean 'token'\?"),
        (changed(stacks={"one": {"mixers.c.n_heads": 0}}), r"mine\.yaml: stacks\.one\..*n_heads"),
        (changed(spec="carve-tinny"), r"mine\.yaml: .*'carve-tinny'.*did you mean 'carve-tiny'\?"),
        (changed(spec={**MINIMAL["spec"], "d_modle": 8}), r"mine\.yaml: .*'d_modle'.*did you mean 'd_model'\?"),
    ],
)
def test_a_stack_that_cannot_be_built_is_named_before_anything_trains(data, message):
    with pytest.raises(SpecError, match=message):
        make_plan(study_from(data, "mine.yaml"))


def test_an_unknown_study_names_the_nearest_and_a_missing_file_says_so(tmp_path):
    with pytest.raises(SpecError, match=r"no study 'quickstrat' \(did you mean 'quickstart'\?\)"):
        load_study("quickstrat")
    with pytest.raises(SpecError, match=r"gone\.yaml: no such file"):
        load_study(tmp_path / "gone.yaml")


def test_a_file_is_read_with_its_overrides(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    study = load_study(path, ["seeds=[3, 4]", "tasks.recall.train.lr=0.5", "name=other"])
    assert study.seeds == (3, 4)
    assert study.tasks["recall"].train.lr == 0.5
    assert study.tasks["recall"].train.steps == 2
    assert study.name == "other"
    assert study.to_dict()["overrides"] == ("seeds=[3, 4]", "tasks.recall.train.lr=0.5", "name=other")
    with pytest.raises(SpecError, match=r"^override .seeds=3.: seeds: expected list"):
        load_study(path, ["seeds=3"])


def test_a_file_runs_no_code_and_explodes_no_aliases(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(SpecError, match=r"mine\.yaml"):
        load_study(path)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path.write_text(bomb)
    with pytest.raises(SpecError, match=r"mine\.yaml"):
        load_study(path)


def test_what_all_tasks_share_gives_way_to_what_one_says():
    data = changed(
        train={"lr": 0.5, "steps": 7},
        tasks={
            "one": {"type": "mqar", "train": {"steps": 3}},
            "two": {"type": "mqar"},
        },
    )
    tasks = study_from(data).tasks
    assert (tasks["one"].train.lr, tasks["one"].train.steps) == (0.5, 3)
    assert (tasks["two"].train.lr, tasks["two"].train.steps) == (0.5, 7)


def test_axes_cross_every_stack_and_label_what_they_vary():
    data = changed(
        stacks={"full": {"layers": "a*2"}, "none": {"layers": "c*2"}},
        axes={"d_model": [16, 32], "mixers.c.erase": ["token", "none"]},
    )
    study = study_from(data)
    assert len(study.stacks) == 8
    assert study.stacks["full, d_model=16, erase=token"] == {"layers": "a*2", "d_model": 16, "mixers.c.erase": "token"}
    alone = study_from(changed(axes={"layers": ["a a", "a c"]}))
    assert list(alone.stacks) == ["layers=a a", "layers=a c"]


def test_axis_values_are_said_as_yaml_writes_them():
    study = study_from(changed(axes={"max_context": [None, 64], "tie_embeddings": [True, False]}))
    assert list(study.stacks)[:2] == [f"max_context=null, tie_embeddings={word}" for word in ("true", "false")]


def test_axis_values_that_only_look_alike_are_distinct():
    study = study_from(changed(axes={"tie_embeddings": [True, 1], "mixers.c.erase": ["1/4", 0.25]}))
    assert len(study.stacks) == 4


STAGES = [{"pairs": 1, "steps": 20}, {"pairs": 2, "steps": 40}]


def curriculum(train, shared=None):
    task = {"type": "mqar", "pairs": 4, "keys": 8, "values": 8, "curriculum": STAGES, "train": train}
    return changed(tasks={"recall": task}, train=shared or {})


def test_a_training_that_ends_within_its_curriculum_is_refused_with_ways_out():
    said = (
        r"^mine\.yaml: {}: the curriculum of tasks\.recall takes 60 steps and the whole training {}, so the task's own "
        r"pairs, 4, would never be trained on: give more steps \({}=120, say\), or a shorter curriculum "
        r"\(tasks\.recall\.curriculum=\[{}\]\)$"
    )
    own, shared = r"tasks\.recall\.train\.steps", r"train\.steps"
    half = r"\{pairs: 1, steps: 10\}, \{pairs: 2, steps: 20\}"
    with pytest.raises(SpecError, match=said.format(own, 60, own, half)):
        study_from(curriculum({"steps": 60}), "mine.yaml")
    with pytest.raises(SpecError, match=said.format(shared, 59, shared, r"\{pairs: 1, steps: 9\}, .*")):
        study_from(curriculum({}, {"steps": 59}), "mine.yaml")
    with pytest.raises(SpecError, match=said.format(own, 1, own, "")):
        study_from(curriculum({"steps": 1}), "mine.yaml")
    assert study_from(curriculum({"steps": 61})).tasks["recall"].train.steps == 61
    assert study_from(curriculum({})).tasks["recall"].train.steps == 1000


def test_a_shipped_study_that_is_cut_short_says_which_overrides_would_do():
    short = "tasks.recall.train.steps=60"
    with pytest.raises(SpecError, match=rf"^override '{short}': tasks\.recall\.train\.steps: ") as refused:
        load_study("quickstart", [short])
    more, fewer = re.findall(r"\((tasks\.recall\.[^ ]*?=\d+|tasks\.recall\.curriculum=[^)]*)", str(refused.value))
    assert load_study("quickstart", [more]).tasks["recall"].train.steps == 240
    assert (
        sum(stage["steps"] for stage in load_study("quickstart", [short, fewer]).tasks["recall"].task["curriculum"])
        == 30
    )


def test_a_name_may_be_any_that_a_folder_can_have():
    for name in ("a", "Grün 2.1_x-y", "x" * 100):
        assert study_from(changed(name=name)).name == name


def test_axes_with_one_last_word_are_told_apart_by_their_whole_path():
    study = study_from(changed(axes={"mixers.a.n_heads": [1], "mixers.c.n_heads": [2]}))
    assert list(study.stacks) == ["mixers.a.n_heads=1, mixers.c.n_heads=2"]


def test_nested_and_dotted_overrides_are_the_same():
    nested = study_from(changed(stacks={"s": {"mixers": {"c": {"erase": "token"}}}}))
    dotted = study_from(changed(stacks={"s": {"mixers.c.erase": "token"}}))
    assert nested.stacks == dotted.stacks


def test_a_resolved_study_says_every_default():
    data = study_from(MINIMAL).to_dict()
    assert data["tasks"]["recall"]["train"]["weight_decay"] == 0.1
    assert data["seeds"] == (0,)
    assert "folder" not in data  # it must read the same on another machine
    assert dataclasses.is_dataclass(study_from(MINIMAL))


def test_a_shipped_path_is_a_file_that_loads():
    assert load_study(study_path("quickstart")).stacks == load_study("quickstart").stacks
