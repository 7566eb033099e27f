"""A plan is a study made concrete: every stack at the budget, counted, and crossed with tasks and seeds."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from own_code import forgotten

from hybridzoo.architectures import Spec, account, build_model
from hybridzoo.kernels.source import effective_source
from hybridzoo.mixers import SpecError
from hybridzoo.studies import code as code_module
from hybridzoo.studies import load_study, make_plan, study_from
from hybridzoo.studies.code import code_digest
from hybridzoo.studies.plan import Plan


def study(**keys):
    data = {
        "name": "small",
        "spec": {
            "d_model": 16,
            "mixers": {
                "a": {"type": "attention", "n_heads": 2},
                "c": {"type": "carve", "n_heads": 2, "head_dim": 8},
                "g": {"type": "gdn2", "n_heads": 2, "head_dim": 8},
            },
            "ffn": {"type": "swiglu", "width": 64},
        },
        "stacks": {
            "attention": {"layers": "a*4"},
            "mixed": {"layers": "a c*3"},
            "token": {"layers": "c[erase=token]*4"},
            "beside": {"layers": "(a+g)*2"},
        },
        "hold": {"tolerance": 0.02},
        "seeds": [0, 1],
        "tasks": {
            "recall": {"type": "mqar", "pairs": 2, "keys": 8, "values": 8, "train": {"steps": 2}},
            "more": {"type": "mqar", "pairs": 2, "keys": 64, "values": 64, "train": {"steps": 2}},
        },
    }
    return study_from({**data, **keys})


def test_every_stack_meets_the_budget_on_every_task():
    plan = make_plan(study())
    for task in plan.shown:
        counts = [stack.parameters[task] for stack in plan.stacks]
        assert max(counts) / min(counts) < 1.02
    assert plan.budgets == ("params",)
    assert all(abs(stack.parameters["recall"] / plan.targets["params"] - 1) <= 0.02 for stack in plan.stacks)


def test_the_largest_stack_is_the_budget_unless_a_number_is_given():
    free = make_plan(study(hold=None))
    assert (free.budgets, free.targets) == (("",), {})
    assert make_plan(study()).targets == {"params": max(stack.parameters["recall"] for stack in free.stacks)}
    assert make_plan(study(hold={"params": 40_000})).targets == {"params": 40_000}


def test_a_stack_that_cannot_meet_the_budget_is_listed_and_the_rest_go_on():
    # Between what the narrowest FFN leaves of the gated stacks and of the plain one.
    wide = {"attention": {"layers": "a"}, "deep": {"layers": "g*12"}}
    plan = make_plan(study(stacks=wide, hold={"params": 6_000}))
    assert [stack.label for stack in plan.stacks] == ["attention"]
    ((budget, label, why),) = plan.excluded
    assert (budget, label) == ("params", "deep")
    assert "at an FFN width of 1" in why
    assert {trial.stack for trial in plan.trials} == {"attention"}


def test_a_budget_that_nothing_meets_is_an_error_that_lists_every_stack():
    with pytest.raises(SpecError, match=r"no stack can meet the budget \(attention: .*; mixed: .*; token: "):
        make_plan(study(hold={"params": 10}))


def test_costs_are_those_of_the_resolved_spec():
    for stack in make_plan(study(context=128)).stacks:
        for task in ("recall", "more"):
            spec = Spec.from_dict(stack.specs[task], "x")
            cost = account(spec, context=128)
            assert stack.parameters[task] == cost.parameters
            # Decoding is counted at the study's context, training at the length of the training's own sequences.
            assert stack.decode_flops[task] == cost.decode_flops_per_token
            assert stack.train_flops[task] == account(spec, context=6).train_flops_per_token
            assert (stack.state_bytes, stack.kv_bytes) == (cost.state_bytes, cost.kv_bytes)


def test_a_stack_says_its_family_and_its_share_of_attention():
    said = {stack.label: (stack.family, stack.attention) for stack in make_plan(study()).stacks}
    assert said == {
        "attention": ("attention", 1.0),
        "mixed": ("carve", 0.25),
        "token": ("carve[erase=token]", 0.0),
        "beside": ("gdn2", 0.5),
    }


def test_a_curriculum_is_counted_at_the_length_it_ends_with():
    stages = [{"pairs": 1, "steps": 1}, {"pairs": 2, "steps": 1}]
    task = {"type": "mqar", "pairs": 4, "keys": 8, "values": 8, "curriculum": stages}
    assert make_plan(study(tasks={"recall": {**task, "train": {"steps": 3}}})).lengths == {"recall": 12}


def test_a_kind_is_all_but_ratio_order_and_what_met_the_budget():
    def kinds(**keys):
        return {stack.label: stack.kind for stack in make_plan(study(**keys)).stacks}

    same = kinds(stacks={"a": {"layers": "a c"}, "b": {"layers": "c*3 a"}, "c": {"layers": "(c a)*2", "ffn.width": 32}})
    assert same["a"] == same["b"] == same["c"]
    other = kinds(
        stacks={
            "mixed": {"layers": "a c"},
            "window": {"layers": "a c", "mixers.a.window": 8},
            "wide": {"layers": "a c", "d_model": 32},
            "token": {"layers": "a c[erase=token]"},
            "two": {"layers": "a c c[content_rank=1]"},
            "beside": {"layers": "a+c"},
        },
        hold=None,
    )
    assert len({json.dumps(dataclasses.asdict(kind)) for kind in other.values()}) == len(other)
    changed = {
        name: value for name, value in other["window"].attention.items() if other["mixed"].attention[name] != value
    }
    assert changed == {"attention.window": 8}
    assert other["window"].recurrent == other["mixed"].recurrent
    wide = {name for name, value in other["wide"].rest.items() if other["mixed"].rest[name] != value}
    assert wide == {"d_model"}
    assert (other["wide"].recurrent, other["wide"].attention) == (other["mixed"].recurrent, other["mixed"].attention)


def test_a_key_changes_with_the_code_of_a_users_own_classes(tmp_path, monkeypatch):
    source = (
        "from dataclasses import dataclass\nfrom hybridzoo.mixers import Carve, register_mixer\n\n\n"
        "@register_mixer('own_{}', source='here', summary='as carve')\nclass Own(Carve):\n"
        "    @dataclass(frozen=True, kw_only=True)\n    class Config(Carve.Config):\n        factor: int = {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    texts = {
        "first": source,
        "second": source + "# said in passing\n",
        "third": source.replace("int = {}", "int = 1 + {}"),
    }
    digests = {}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text.format("x", 1).replace("own_x", f"own_{name}"))
        with forgotten():
            digests[name] = code_digest([importlib.import_module(name).Own])
    assert len(set(digests.values())) == 3  # each has a name of its own
    renamed = [effective_source((tmp_path / f"{name}.py").read_text()).replace(name, "x") for name in texts]
    assert renamed[0] == renamed[1] != renamed[2]


def test_a_key_changes_with_every_module_that_a_users_own_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "parcel_zz").mkdir()
    files = {
        "own_zz.py": "from helper_zz import double\nfrom constant_zz import FACTOR\nfrom parcel_zz import deep\n"
        "import numpy, json\n\n\nclass Own:\n    def f(self):\n        return double(FACTOR)\n",
        "helper_zz.py": "import further_zz\n\n\ndef double(x):\n    return 2 * x\n",
        "further_zz.py": "import own_zz\nX = 1\n",
        "constant_zz.py": "FACTOR = 3\n",
        "parcel_zz/__init__.py": "",
        "parcel_zz/deep.py": "from .deeper import y\n",
        "parcel_zz/deeper.py": "y = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    module = importlib.import_module("own_zz")
    reached = {one.__name__ for one in code_module._reached([module])}
    assert reached == {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    digests = [code_digest([module.Own]), code_digest([module.Own])]
    assert digests[0] == digests[1] == code_digest([], [module])
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}Z = 12\n")
        digests.append(code_digest([module.Own]))
    assert len(set(digests)) == 1 + len(files)


def test_of_a_script_the_class_counts_and_what_it_imports(tmp_path):
    (tmp_path / "helper_yy.py").write_text("F = 1\n")
    script = tmp_path / "script.py"
    text = (
        "from helper_yy import F\nfrom hybridzoo.studies.code import code_digest\n"
        "class Own:\n    f = F\n{}print(code_digest([Own]))\n"
    )

    def digest(lines="", inside=""):
        script.write_text(text.format(inside + lines))
        words = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, script], env=words, capture_output=True, text=True, check=True).stdout

    first = digest()
    assert digest("seeds = [0, 1]\n") == first
    assert digest(inside="    g = 2\n") != first
    (tmp_path / "helper_yy.py").write_text("F = 12\n")
    assert digest() != first


def test_trials_say_which_code_decides_them(monkeypatch):
    first = {trial.key for trial in make_plan(study()).trials}
    monkeypatch.setattr(code_module, "_zoo_digest", lambda: "of other code")
    assert not first & {trial.key for trial in make_plan(study()).trials}


def test_trials_cross_stacks_tasks_and_seeds_with_seeds_outermost():
    plan = make_plan(study())
    assert [(t.seed, t.task, t.stack) for t in plan.trials] == [
        (seed, task, stack.label) for seed in (0, 1) for task in ("recall", "more") for stack in plan.stacks
    ]
    assert len({trial.key for trial in plan.trials}) == len(plan.trials)
    assert len({trial.file_name for trial in plan.trials}) == len(plan.trials)
    assert all(trial.train["seed"] == trial.seed for trial in plan.trials)


def test_a_plan_reads_back_from_json_as_it_was():
    plan = make_plan(study())
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_key_changes_with_what_decides_a_result_and_with_nothing_else():
    def keys(**changes):
        return {trial.key for trial in make_plan(study(seeds=[0], **changes)).trials}

    same = keys()
    assert keys(name="renamed", about="other words", context=99) == same
    relabelled = {"A": {"layers": "a*4"}, "B": {"layers": "a c*3"}, "C": {"layers": "c[erase=token]*4"}}
    assert keys(stacks={**relabelled, "D": {"layers": "(a+g)*2"}}) == same
    assert not keys(train={"lr": 0.5}) & same
    assert not keys(hold={"params": 40_000}) & same


def test_how_a_spec_is_written_is_in_no_key():
    base = study().spec
    first = make_plan(study(seeds=[0], stacks={"A": {"layers": "a c*3"}, "B": {"layers": "(c g)*2"}}, hold=None))
    unused = {**base, "mixers": {**base["mixers"], "m": {"type": "mamba2", "n_heads": 2}}}
    spelled = {"A": {"layers": "a c c c"}, "B": {"layers": "c g c g"}}
    again = make_plan(study(seeds=[0], spec=unused, stacks=spelled, hold=None))
    assert [trial.key for trial in again.trials] == [trial.key for trial in first.trials]
    # One word of a mixer that does stand in a layer is another model, whatever it is called.
    changed = {**base, "mixers": {**base["mixers"], "g": {"type": "gdn2", "n_heads": 1, "head_dim": 8}}}
    other = make_plan(study(seeds=[0], spec=changed, stacks=spelled, hold=None))
    assert [a.key == b.key for a, b in zip(first.trials, other.trials, strict=True)] == [True, False] * 2
    backwards = make_plan(study(seeds=[0], stacks={"A": {"layers": "c*3 a"}, "B": {"layers": "(g c)*2"}}, hold=None))
    assert not {trial.key for trial in first.trials} & {trial.key for trial in backwards.trials}


def test_what_auto_stands_for_is_in_the_key(monkeypatch):
    def planned(there, **train):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        trials = make_plan(study(seeds=[0], train=train)).trials
        assert all("auto" not in trial.train.values() for trial in trials)
        return {trial.key for trial in trials}

    cpu, gpu = planned(False), planned(True)
    assert not cpu & gpu
    assert planned(True, device="cpu") == planned(False, device="cpu", amp="none", compile=False) == cpu
    assert planned(False, device="cuda") == planned(True, device="cuda:1", amp="bf16", compile=True) == gpu
    assert not planned(True, amp="none") & gpu


def test_stacks_that_are_named_as_one_share_their_trials():
    """The plan's note and the keys agree on what one stack is."""
    stacks = {"A": {"layers": "a a"}, "B": {"layers": "a*2"}, "C": {"layers": "a"}}
    plan = make_plan(study(seeds=[0], stacks=stacks, hold={"params": "largest"}))
    assert any("one stack, trained once: A; B" in note for note in plan.repeats)
    assert [trial.stack for trial in plan.distinct] == ["A", "C"] * 2


def test_a_spec_beside_the_study_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text(
        "name: base\nd_model: 16\nvocab_size: 32\nlayers: a\nmixers: {a: {type: attention, n_heads: 2}}\n"
        "ffn: {type: gelu, width: 8}\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nspec: base.yaml\ntasks: {r: {type: mqar, pairs: 2, keys: 8, values: 8}}\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (stack,) = make_plan(load_study(tmp_path / "mine.yaml")).stacks
    assert stack.label == "base"
    assert stack.attention == 1.0


def test_inference_is_counted_within_what_the_stacks_take():
    base = study().spec
    short = make_plan(study(spec={**base, "max_context": 64}))
    assert short.study["context"] == 64
    assert make_plan(study()).study["context"] == 4096
    with pytest.raises(SpecError, match=r"^study: context: 128 is over max_context 64 of stacks\.attention"):
        make_plan(study(spec={**base, "max_context": 64}, context=128))
    with pytest.raises(SpecError, match=r"^study: tasks\.recall: its sequences of 6 are over max_context 4 of stacks"):
        make_plan(study(spec={**base, "max_context": 4}))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("spec=carve-tny", r"override 'spec=carve-tny': spec: no spec 'carve-tny' \(did you mean 'carve-tiny'"),
        ("seeds=[0,0]", r"override 'seeds=\[0,0\]': seeds: must be distinct"),
        ("train.stps=3", r"override 'train.stps=3': train: unknown key 'stps'"),
        (
            "stacks.attention.layers=q",
            r"override 'stacks.attention.layers=q': stacks.attention.layers: column 1: unknown mixer 'q'",
        ),
        ("hold.params=10", r"override 'hold.params=10': hold.params: no stack can meet the budget"),
        ("tasks.recall.pairs=0", r"override 'tasks.recall.pairs=0': tasks.recall.pairs: must be at least 1"),
        (
            "tasks.recal.pairs=2",
            r"override 'tasks.recal.pairs=2': tasks: unknown label 'recal' \(did you mean 'recall'\?\); known: recall,",
        ),
        (
            "stacks.atention.layers=a",
            r"override 'stacks.atention.layers=a': stacks: unknown label 'atention' .*'attention'",
        ),
        (
            "axes.placment=[even]",
            r"override .*': axes.placment: unknown key 'placment'; .*; of hybrids: .* \(did you mean 'placement'\?\)",
        ),
        ("axes.d_modl=[16]", r"override 'axes.d_modl=\[16\]': axes.d_modl: unknown key 'd_modl' .*'d_model'"),
        (
            "axes={mixers.c.erase: [tokn]}",
            r"override 'axes=\{mixers.c.erase: \[tokn\]\}': axes.mixers.c.erase: 'tokn' is not one of",
        ),
        ("axes={mixers.c.eras: [a]}", r"override .*': axes.mixers.c.eras: unknown key 'eras' .*'erase'"),
        ('stacks.bad={layers: "z*2"}', r"override 'stacks.bad=.*': stacks.bad.layers: column 1: unknown mixer 'z'"),
        ("stacks.bad={layers: a, d_modl: 3}", r"override 'stacks.bad=.*': stacks.bad: unknown key 'd_modl'"),
        ("seeds=[0.5]", r"override 'seeds=\[0.5\]': seeds\[0\]: expected integer, got 0.5"),
        ("axes={d_model: 16}", r"override .*: axes.d_model: expected a list of values, as in \[16, 32\], got 16"),
    ],
)
def test_an_error_names_the_override_that_brought_it(override, said):
    with pytest.raises(SpecError, match=f"^{said}"):
        make_plan(load_study("quickstart", [override]))


def test_in_a_crossed_stack_an_error_keeps_the_label_that_was_declared(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nspec: transformer-tiny\nstacks: {delta: {layers: a}}\naxes: {d_model: [32, 64]}\n"
        "tasks: {r: {type: mqar, pairs: 2, keys: 8, values: 8}}\n"
    )
    with pytest.raises(SpecError, match=r"^override 'stacks.delta.layers=d\*': stacks.delta.layers: "):
        make_plan(load_study(path, ["stacks.delta.layers=d*"]))
    path.write_text(path.read_text().replace("32", "0"))
    with pytest.raises(SpecError, match=r"mine.yaml: axes.d_model: must be at least 1, got 0$"):
        make_plan(load_study(path))


def test_a_new_task_or_stack_may_come_from_overrides():
    study = load_study(
        "quickstart",
        ["tasks.more.pairs=4", "tasks.more.type=mqar", "stacks.new={layers: a}", "stacks.new.d_model=32"],
    )
    assert study.tasks["more"].task == {"pairs": 4, "type": "mqar"}
    assert study.stacks["new"] == {"layers": "a", "d_model": 32}


def test_a_stack_that_an_axis_does_not_change_is_listed_once():
    stacks = {"none": {"layers": "c*2"}, "some": {"layers": "c a"}}
    axes = {"d_model": [16, 32], "mixers.a.window": [None, 8]}
    plan = make_plan(study(stacks=stacks, axes=axes, hold=None))
    assert [stack.label for stack in plan.stacks] == [
        *("none, d_model=16", "none, d_model=32"),
        *("some, d_model=16, window=null", "some, d_model=16, window=8"),
        *("some, d_model=32, window=null", "some, d_model=32, window=8"),
    ]
    assert plan.repeats == ("none: listed once along window, which changes nothing of it",)
    one = make_plan(study(stacks=stacks, axes={"mixers.a.window": [8]}, hold=None))  # nothing to list twice
    assert [stack.label for stack in one.stacks] == ["none, window=8", "some, window=8"]


def test_what_is_wrong_in_a_file_is_put_on_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nspec: carve-tny\ntasks: {r: {type: mqar, pairs: 2, keys: 8, values: 8}}\n")
    with pytest.raises(SpecError, match=r"mine\.yaml: spec: no spec 'carve-tny'"):
        make_plan(load_study(path, ["seeds=[1]"]))


def content(chunk, **task):
    words = {"type": "mqar", "pairs": 4, "keys": 8, "values": 8, "train": {"steps": 8, "batch_size": 2}, **task}
    carve = f"c[content_chunk={chunk}]"
    stacks = {"content": {"layers": carve}, "token": {"layers": "c[erase=token]"}, "mixed": {"layers": f"a {carve}"}}
    return make_plan(study(stacks=stacks, tasks={"recall": words}))


def test_a_content_gate_that_no_sequence_of_training_lets_act_is_named():
    for chunk in (12, 64):
        (note,) = content(chunk).notes
        assert note.startswith("on recall, whose sequences of training have at most 12 tokens, ")
        assert f"a content_chunk of {chunk} has no second chunk" in note
        assert note.endswith(": content; mixed")
    assert not content(11).notes


def test_a_content_chunk_is_held_against_the_longest_sequences_of_a_curriculum():
    stages = [{"pairs": 1, "steps": 4}]
    assert not content(11, curriculum=stages).notes
    assert content(12, curriculum=stages).longest == {"recall": 12}


def test_a_content_gate_that_is_named_does_nothing():
    torch.manual_seed(0)
    for chunk, same in ((12, True), (11, False)):
        plan = content(chunk)
        spec = Spec.from_dict(plan.stacks[0].specs["recall"], "x")
        assert bool(plan.notes) == same
        model = build_model(spec)
        ids = torch.randint(8, (2, 12))
        gates = [one for name, one in model.named_parameters() if "content_" in name]
        assert len(gates) == 2
        before = model(ids).logits
        with torch.no_grad():
            for one in gates:
                one.normal_()
        assert torch.equal(model(ids).logits, before) == same


def test_a_learning_curve_that_eval_every_leaves_no_point_of_is_named():
    def notes(every):
        return content(4, train={"steps": 8, "batch_size": 2, "eval_every": every}).notes

    (note,) = notes(8)
    assert note.startswith("on recall, train.eval_every 8 is not below the 8 steps: there is no learning curve")
    assert notes(9)
    assert not notes(7)
    assert not notes(0)
