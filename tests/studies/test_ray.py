"""Ray, where it is installed: the same events as every engine, through lost workers and lost nodes."""

from __future__ import annotations

import os
import sys

import pytest

ray = pytest.importorskip("ray", reason="needs the extra `ray`: pip install -e '.[ray]'")

from engine_cases import collect, ends  # noqa: E402
from ray.cluster_utils import Cluster as SimulatedCluster  # noqa: E402

from hybridzoo.studies import Execution, make_plan, read_plan, read_trials, run_study, study_from  # noqa: E402
from hybridzoo.studies.display import Display  # noqa: E402
from hybridzoo.studies.engines import make_engine  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of files and threads that it leaves to the end
]

STUDY = {
    "name": "on-ray",
    "spec": {"d_model": 8, "mixers": {"a": {"type": "attention", "n_heads": 1}}, "ffn": {"type": "gelu", "width": 8}},
    "stacks": {"one": {"layers": "a"}, "two": {"layers": "a*2"}},
    "tasks": {
        "recall": {
            "type": "mqar",
            "pairs": 2,
            "keys": 4,
            "values": 4,
            "examples": 8,
            "train": {"steps": 4, "batch_size": 2, "log_every": 1},
        }
    },
}


class Quiet(Display):
    """Counts the steps that it hears of."""

    def __init__(self):
        self.steps = 0

    def progress(self, trial, progress):
        self.steps += 1


@pytest.fixture(scope="module")
def cluster():
    """A head of two CPUs, which ends with the tests; Ray is told where it is as users tell it."""
    environment = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    simulated = SimulatedCluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
    os.environ["RAY_ADDRESS"] = simulated.address
    yield simulated
    simulated.shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def engine(cluster):
    with make_engine("ray", gpu_share=0.5) as engine:
        yield engine
    assert not ray.is_initialized()


def test_jobs_on_ray_end_once_each_through_errors_and_lost_workers(engine, tmp_path):
    jobs = [("ok", 0), ("raise", 1), ("die", 2), ("die once", str(tmp_path / "died")), ("ok", 4)]
    events = collect(engine, jobs, retries=1)
    outcome = ends(events)
    assert [outcome[i].kind for i in range(5)] == ["done", "failed", "failed", "done", "done"]
    assert outcome[1].value == "ValueError: bad job 1"
    assert "in work" in outcome[1].traceback
    assert outcome[2].value.startswith("the worker or its node was lost")
    assert outcome[2].value.endswith("2 times in a row")
    assert outcome[0].value[1] == 1  # threads
    assert [event.value for event in events if event.kind == "progress" and event.index == 4] == [4]


def test_a_task_asks_for_its_share_of_a_gpu(engine):
    assert engine.width == 2  # halves of one GPU
    outcome = ends(collect(engine, [("device", 0)] * 3))
    assert {event.value[0] for event in outcome.values()} == {"0"}


def test_what_no_node_has_is_refused(cluster):
    with pytest.raises(ValueError, match="asks for 64 CPUs and 1 of a GPU, and no node has that"):
        make_engine("ray", threads=64)
    assert not ray.is_initialized()


def test_a_study_on_ray_finds_what_this_process_finds(cluster, tmp_path):
    study = study_from(STUDY)
    display = Quiet()
    far = run_study(study, tmp_path / "far", Execution(engine="ray", gpu_share=0.5), display=display)
    run_study(study, tmp_path / "near", Execution(engine="here"), display=Display())
    assert (far.finished, far.failed) == (2, ())
    assert display.steps > 0
    plan = make_plan(study)
    scores = [
        [result["metrics"]["accuracy"] for result in read_trials(tmp_path / name, read_plan(tmp_path / name))[0]]
        for name in ("far", "near")
    ]
    assert len(scores[0]) == len(plan.trials)
    assert scores[0] == pytest.approx(scores[1])


def test_a_trial_lost_with_its_node_is_run_again_on_another(cluster, tmp_path):  # last: Ray is busy with it afterwards
    going = cluster.add_node(num_cpus=8, num_gpus=0)
    nodes = []

    def take_the_node_away(event):
        if event.kind == "progress":
            nodes.append(event.value)
            if len(nodes) == 1:
                assert event.value == going.node_id
                cluster.add_node(num_cpus=8, num_gpus=0)
                cluster.remove_node(going, allow_graceful=False)

    with make_engine("ray", threads=8, gpu_share=0) as engine:
        events = collect(engine, [("node", str(tmp_path / "there"))], take_the_node_away)
    assert [event.kind for event in events if event.kind != "progress"] == ["started", "lost", "started", "done"]
    assert events[-1].value != nodes[0]
