import json
import math
import os
import re
import signal
import sys
from contextlib import contextmanager

import pytest
import torch

from hybridzoo import training
from hybridzoo.architectures import build_model, load_spec
from hybridzoo.cli import train as train_module
from hybridzoo.cli.runs import RECORD, SPEC, WEIGHTS, is_run, load_run, save_run
from hybridzoo.training import data, train
from hybridzoo.training.lock import LOCK, only_one

QUICK = ["--steps", "3", "--batch-size", "2", "task.length=32", "task.examples=4", "task.quick_examples=2"]


@pytest.fixture
def text(tmp_path):
    """A folder to train on, so that no test reads the whole standard library."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(8):
        (folder / f"{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n" * 20)
    return folder


@pytest.fixture
def trained(run, tiny, text):
    run("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a")
    return tiny.parent / "runs" / "a"


def test_training_leaves_weights_spec_and_record(trained):
    record = json.loads((trained / RECORD).read_text())
    assert record["train"]["steps"] == 3
    assert record["history"]["steps"] == [1, 2, 3]
    assert record["metrics"]["bits_per_byte"] > 0
    assert load_spec(trained / SPEC).pattern == "c a"
    left = {path.name for path in trained.iterdir() if path.name.startswith(".")}
    assert left <= {LOCK}, "nothing half-written is left"


def test_lines_of_a_training_say_what_is_held_out_and_how_long_is_left(run, tiny, text, monkeypatch):
    monkeypatch.setattr(train_module, "PLAIN_EVERY", 0.0)
    lines = run("train", tiny, *QUICK, f"task.folder={text}").stderr.splitlines()
    assert re.search(
        r"^step 2/3: loss \d\.\d+ nats, held-out \d\.\d+ bits a byte, .* tokens/s, about \d+ s left$", lines[-2]
    )
    assert "left" not in lines[-1]


def test_saved_weights_come_back_bit_for_bit(tiny, tmp_path):
    spec = load_spec(tiny, ["tie_embeddings=true"])
    model = build_model(spec)
    save_run(tmp_path / "run", model, spec, {})
    loaded = load_run(tmp_path / "run").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_the_same_seed_trains_the_same_model(run, tiny, text):
    for name in ("b", "c"):
        run("train", tiny, *QUICK, f"task.folder={text}", "--seed", "5", "--out", name)
    one, two = (load_run(tiny.parent / name).state_dict() for name in ("b", "c"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_vocabulary_becomes_the_tasks_own(run, tiny):
    words = ["task.pairs=4", "task.keys=8", "task.values=8", "task.examples=4", "--steps", "2", "--batch-size", "2"]
    record = json.loads(run("train", tiny, "--task", "mqar", *words, "--json").stdout)
    assert record["folder"] == "runs/mine-mqar"
    assert 0 <= record["metrics"]["accuracy"] <= 1
    assert load_spec(tiny.parent / "runs/mine-mqar" / SPEC).vocab_size < 256


def test_a_vocabulary_that_is_exchanged_is_said_to_be(run, tiny, text):
    words = [*QUICK, f"task.folder={text}", "--overwrite"]
    assert "vocab_size" not in run("train", tiny, *words).stderr
    tiny.write_text(tiny.read_text().replace("vocab_size: 256", "vocab_size: 32000"))
    said = (
        "vocab_size: 32,000 of mine becomes 256, the tokens of the task; vocab_size=32000 among the overrides keeps it"
    )
    assert said in run("train", tiny, *words).stderr
    assert "vocab_size" not in run("train", tiny, *words, "vocab_size=32000").stderr


def test_a_content_gate_that_cannot_act_is_named(run, tiny, text):
    words = [f"task.folder={text}", "--overwrite", *QUICK]
    assert "content gate" not in run("train", tiny, *words).stderr
    assert "c: its content gate never acts here" in run("train", tiny, *words, "mixers.c.content_chunk=32").stderr


def test_curves_for_tensorboard_are_the_points_of_the_history(run, tiny, text):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*QUICK, f"task.folder={text}", "train.eval_every=2", "--out", "runs/a", "--tensorboard"]
    run("train", tiny, *words)
    run("train", tiny, *words, "--seed", "1", "--overwrite")  # whose curves take the place of the first
    folder = tiny.parent / "runs" / "a"
    history = json.loads((folder / RECORD).read_text())["history"]
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()

    def curve(name):
        return [event.step for event in events.Scalars(name)], [event.value for event in events.Scalars(name)]

    for name in ("loss", "grad_norm", "lr"):
        assert curve(name) == (history["steps"], pytest.approx(history[name], rel=1e-6)), name
    assert len(curve("tokens_per_second")[0]) == 3
    scores = [evaluation["metrics"]["bits_per_byte"] for evaluation in history["evaluations"]]
    assert curve("held-out/bits_per_byte") == ([2, 3], pytest.approx(scores, rel=1e-6))


def test_without_tensorboard_curves_are_refused_before_anything_is_trained(run, tiny, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = run("train", tiny, *QUICK, "--tensorboard", ok=False)
    assert result.exit_code == 2
    assert result.stderr == "error: this needs tensorboard: pip install -e '.[train]' in a clone of hybridzoo\n"
    assert not (tiny.parent / "runs").exists()


def test_no_name_of_a_spec_leads_out_of_runs(run, tiny, text):
    tiny.write_text(tiny.read_text().replace("name: mine", "name: ../../esc[1]"))
    record = json.loads(run("train", tiny, *QUICK, f"task.folder={text}", "--json").stdout)
    assert record["folder"] == "runs/esc-1-bytes"


def test_a_trained_model_is_not_overwritten_unasked(run, trained, tiny, text):
    words = ["train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a"]
    assert "--overwrite" in run(*words, ok=False).stderr
    run(*words, "--overwrite")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "byts"], "did you mean 'bytes'?"),
        (["task.lenght=32"], "did you mean 'length'?"),
        (["train.stpes=3"], "did you mean 'steps'?"),
        (["train.steps=3", "--steps", "4"], "given twice"),
        (["layers=c b"], "unknown mixer 'b'"),
        (["--lr", "0"], "train.lr"),
        (["vocab_size=7"], "below the task's 256"),
        (["task=mqar"], "task"),
        (["--device", "quantum"], "train.device"),
        (["max_context=16", "task.length=32"], "task: its sequences of 32 are over max_context 16 of mine"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(run, tiny, words, said):
    result = run("train", tiny, *words, ok=False)
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr
    assert not (tiny.parent / "runs").exists()


def test_a_run_that_diverges_fails_and_saves_nothing(run, tiny, text):
    result = run("train", tiny, *QUICK, f"task.folder={text}", "--lr", "1e30", "train.warmup=0", ok=False)
    assert result.exit_code == 1
    assert "step" in result.stderr
    assert not list(tiny.parent.glob(f"runs/*/{WEIGHTS}"))


def test_a_folder_that_cannot_be_made_is_found_before_training(run, tiny, text):
    (tiny.parent / "afile").touch()
    result = run("train", tiny, *QUICK, f"task.folder={text}", "--out", "afile", ok=False)
    assert "afile: File exists" in result.stderr
    assert "step 1" not in result.stderr


def test_a_gpu_that_is_not_there_is_found_before_training(run, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in ([], ["train.log_every=5"]):
        result = run("train", tiny, *QUICK, *words, "--device", "cuda", ok=False)
        assert result.exit_code == 2
        assert result.stderr == "error: train.device: 'cuda' is asked for, but torch sees no GPU here\n"
        assert not (tiny.parent / "runs").exists()


@pytest.fixture
def stopped(monkeypatch):
    """Within it a training is told to stop after its second step."""

    @contextmanager
    def within():
        def interrupted(model, task, config, on_progress, checkpoint):
            def stop(progress):
                on_progress(progress)
                if progress.step == 1:
                    os.kill(os.getpid(), signal.SIGINT)

            return train(model, task, config, stop, checkpoint)

        with monkeypatch.context() as patched:
            patched.setattr(training, "train", interrupted)
            yield

    return within


def test_an_interrupted_training_goes_on_with_the_same_command(run, tiny, text, stopped):
    words = ("train", tiny, *QUICK, f"task.folder={text}")
    whole = json.loads(run(*words, "--out", "runs/whole", "--json").stdout)
    with stopped():
        result = run(*words, "--out", "runs/a", ok=False)
    assert result.exit_code == 130
    assert "interrupted; saved after step 2 of 3, and the same command goes on from there" in result.stderr
    folder = tiny.parent / "runs" / "a"
    assert {path.name for path in folder.iterdir()} == {LOCK, "unfinished.pt"}
    other = run(*words, "train.lr=0.5", "--out", "runs/a", ok=False)
    assert other.exit_code != 0
    assert "train.lr is 0.001 there, 0.5 here; give another --out, or --overwrite to start anew" in other.stderr
    result = run(*words, "--out", "runs/a", "--json")
    assert "going on after step 2 of 3, as runs/a/unfinished.pt has it" in result.stderr
    found = json.loads(result.stdout)
    assert found["metrics"] == whole["metrics"]
    assert found["history"]["loss"] == whole["history"]["loss"]
    assert found["seconds"] > found["history"]["seconds"]  # of both sittings
    assert not (folder / "unfinished.pt").exists()


def test_other_text_is_another_training(run, tiny, text, stopped):
    words = ("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a")
    with stopped():
        run(*words, ok=False)
    (text / "0.py").write_text("something = 'else'\n" * 40)
    data._load.cache_clear()  # as another process finds it
    assert "kept of another training: task.text is" in run(*words, ok=False).stderr


def test_an_overwriting_training_that_was_stopped_goes_on_too(run, trained, tiny, text, stopped):
    words = ("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a", "--seed", "5")
    before = (trained / WEIGHTS).read_bytes()
    assert "holds a trained model already" in run(*words, ok=False).stderr
    with stopped():
        run(*words, "--overwrite", ok=False)
    assert (trained / WEIGHTS).read_bytes() == before  # until there is another
    assert "going on after step 2 of 3" in run(*words, "--overwrite").stderr
    assert (trained / WEIGHTS).read_bytes() != before


def test_overwrite_starts_a_damaged_or_another_training_anew(run, tiny, text):
    folder = tiny.parent / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "unfinished.pt").write_text("damaged")
    words = ("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a")
    assert "not a run that was kept, or damaged" in run(*words, ok=False).stderr
    assert "going on" not in run(*words, "--overwrite").stderr
    assert is_run(folder)


def test_what_a_finished_training_could_not_remove_goes_with_the_next_command(run, trained, tiny, text):
    leftover = trained / "unfinished.pt"
    leftover.touch()
    os.utime(leftover, (0, 0))
    words = ("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a")
    assert "holds a trained model already" in run(*words, ok=False).stderr
    assert not leftover.exists()


def test_two_trainings_in_one_folder_are_refused(run, trained, tiny, text):
    words = ("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a", "--overwrite")
    with only_one(trained, "training"):
        assert "runs/a: another process is training in this folder" in run(*words, ok=False).stderr


def test_curves_go_on_where_the_training_does(run, tiny, text, stopped):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a", "--tensorboard")
    with stopped():
        run(*words, ok=False)
    run(*words)
    events = EventAccumulator(str(tiny.parent / "runs" / "a"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_token_files_are_trained_on_with_their_own_vocabulary(run, tiny):
    for name in ("train.bin", "val.bin"):
        torch.arange(600, dtype=torch.int32).numpy().tofile(tiny.parent / name)
    words = ["task.train_file=train.bin", "task.validation_file=val.bin", "task.dtype=int32", "task.vocab_size=600"]
    result = run("train", tiny, "--task", "tokens", *QUICK, *words, "--out", "runs/a", "--json")
    record = json.loads(result.stdout)
    assert load_spec(tiny.parent / "runs" / "a" / SPEC).vocab_size == 600
    assert record["metrics"]["nats_per_token"] == pytest.approx(math.log(600), rel=0.2)
    refused = run("generate", tiny.parent / "runs" / "a", "--prompt", "def ", ok=False)
    assert "600" in refused.stderr


def test_one_that_is_interrupted_before_anything_was_saved_says_so(run, tiny, text, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    result = run("train", tiny, *QUICK, f"task.folder={text}", "--out", "runs/a", ok=False)
    assert result.exit_code == 130
    assert result.stderr.endswith("error: interrupted before anything was saved\n")


def test_a_model_is_not_saved_among_a_study_s_results(run, tiny, text):
    folder = tiny.parent / "runs" / "study"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text("{}")
    result = run("train", tiny, *QUICK, f"task.folder={text}", "--out", folder, "--overwrite", ok=False)
    assert result.exit_code == 2
    assert "runs/study holds a study's run (study.json); give another --out" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["study.json"]


def test_text_goes_on_from_the_prompt(run, trained):
    out = run("generate", trained, "--prompt", "def ", "-n", "8", "--seed", "1").stdout
    assert out.startswith("def ")
    assert out.endswith("\n")
    again = run("generate", trained, "--prompt", "def ", "-n", "8", "--seed", "1").stdout
    assert out == again


def test_the_streamed_text_is_what_the_model_generates(run, trained):
    out = run("generate", trained, "--prompt", "def ", "-n", "6", "--temperature", "0", "--json").stdout
    ids = torch.tensor([list(b"def ")])
    wanted = bytes(load_run(trained).generate(ids, 6)[0, 4:].tolist()).decode(errors="replace")
    assert json.loads(out)["continuation"] == wanted


def test_a_stop_string_ends_the_text_and_stays_in_it(run, trained):
    words = ("generate", trained, "--prompt", "def ", "-n", "12", "--temperature", "0", "--json")
    whole = json.loads(run(*words).stdout)["continuation"]
    stop = whole[3:5]
    found = json.loads(run(*words, "--stop", stop, "--stop", "never said").stdout)
    assert found["continuation"] == whole[: whole.index(stop) + 2]
    assert found["tokens"] < 12


def test_help_says_what_an_option_takes_and_what_it_is_without(run):
    said = " ".join(run("generate", "-h").stdout.replace("│", " ").split())
    assert "above 0, at most 1" in said
    assert "Default: a line break." in said
    assert "130" in " ".join(run("-h").stdout.split())


def test_no_bytes_to_add_leave_the_prompt(run, trained):
    assert run("generate", trained, "--prompt", "def ", "-n", "0").stdout == "def \n"


def test_a_prompt_can_come_from_stdin(run, trained):
    assert run("generate", trained, "--prompt", "-", "-n", "2", stdin="héllo").stdout.startswith("héllo")


@pytest.mark.parametrize("words", [{"stdin": b"a\xffb\r\n"}, {"prompt": "a\udcffb\r\n"}], ids=["stdin", "argument"])
def test_a_prompt_is_bytes_of_any_kind(run, trained, words):
    prompt = words.pop("prompt", "-")
    result = run("generate", trained, "--prompt", prompt, "-n", "0", "--json", **words)
    assert json.loads(result.stdout)["prompt"] == "a\ufffdb\r\n"


def test_an_untrained_spec_speaks_but_says_so(run):
    result = run("generate", "carve-tiny", "d_model=32", "mixers.c.n_heads=2", "mixers.c.head_dim=16", "-n", "2")
    assert "untrained" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: neither a run's folder nor a spec has this name"),
        (["carve-tiny", "vocab_size=300"], "byte-level"),
        (["carve-tiny", "--prompt", ""], "empty"),
        (["carve-tiny", "--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["carve-tiny", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["carve-tiny", "--min-p", "2"], "min_p must be above 0 and at most 1, got 2.0"),
        (["carve-tiny", "--stop", ""], "stop must be a string or several, each of at least one character"),
        (["carve-tiny", "--seed", str(2**64)], f"seed must be a whole number, {-(2**63)} to {2**64 - 1}, got {2**64}"),
        (["carve-tiny", "--temperature", "-1"], "--temperature"),
        (["carve-tiny", "--temperature", "0", "--top-k", "3"], "give a temperature above 0"),
        (["carve-tiny", "max_context=8", "--prompt", "def", "-n", "9"], "12 tokens are more than max_context 8"),
        (["runs/nothing"], "runs/nothing: no such folder, and no such spec"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
        (["quickstart"], "'quickstart' is a study"),
        (["."], "no trained model here"),
    ],
)
def test_what_cannot_be_generated_from_is_refused(run, words, said):
    result = run("generate", *words, ok=False)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "HYBRIDZOO_TRACEBACK" not in result.stderr
    assert result.stdout == ""


def test_a_name_of_nothing_is_neither_a_run_nor_a_spec_and_no_list_follows(run, trained):
    said = run("generate", "nosuch", ok=False).stderr
    assert said == "error: nosuch: neither a run's folder nor a spec has this name; specs: `hybridzoo list --specs`\n"
    assert "(did you mean 'carve-tiny'?)" in run("generate", "carv-tiny", ok=False).stderr
    assert "(did you mean 'runs/a'?)" in run("generate", "runsa", ok=False).stderr


def test_a_trained_model_takes_no_overrides(run, trained):
    assert "as it was trained" in run("generate", trained, "d_model=8", ok=False).stderr


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_weights_that_are_damaged_or_another_models_are_refused(run, trained, tiny, damage):
    weights = trained / WEIGHTS
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        spec = load_spec(tiny, ["ffn.width=8"])
        save_run(tiny.parent / "other", build_model(spec), spec, {})
        (tiny.parent / "other" / WEIGHTS).replace(weights)
    result = run("generate", trained, ok=False)
    assert result.exit_code == 2
    assert WEIGHTS in result.stderr
