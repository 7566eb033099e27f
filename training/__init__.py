"""Training: a config, a loop that is the same on a CPU and a GPU, and text that every machine has.

Start with `train(model, task, TrainConfig(...))`. For a loop of your own over several processes, `shard` is in
`hybridzoo.training.sharding`, which is not imported here: not every torch has distributed. May import architectures and
everything below it; the tasks and the studies that use this loop are in `hybridzoo.studies`.
"""

from hybridzoo.training.checkpoint import Checkpoint, CheckpointError
from hybridzoo.training.config import TrainConfig
from hybridzoo.training.data import ByteCorpus, load_bytes
from hybridzoo.training.history import Evaluation, History
from hybridzoo.training.loop import DivergedError, Progress, evaluating, train
from hybridzoo.training.optimiser import build_optimiser, learning_rate
from hybridzoo.training.task import IGNORED, Batch, Task

__all__ = [
    "IGNORED",
    "Batch",
    "ByteCorpus",
    "Checkpoint",
    "CheckpointError",
    "DivergedError",
    "Evaluation",
    "History",
    "Progress",
    "Task",
    "TrainConfig",
    "build_optimiser",
    "evaluating",
    "learning_rate",
    "load_bytes",
    "train",
]
