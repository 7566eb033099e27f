"""The tasks a study can name. `build_task({"type": "mqar", "pairs": 16})` builds one; `register_task` adds your own."""

from hybridzoo.studies.tasks.base import Shown, StudyTask, build_task, list_tasks, register_task
from hybridzoo.studies.tasks.byte_lm import ByteLm, ByteLmConfig
from hybridzoo.studies.tasks.mqar import Mqar, MqarConfig

__all__ = [
    "ByteLm",
    "ByteLmConfig",
    "Mqar",
    "MqarConfig",
    "Shown",
    "StudyTask",
    "build_task",
    "list_tasks",
    "register_task",
]
