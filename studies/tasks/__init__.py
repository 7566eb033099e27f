"""The tasks a study can name. `build_task({"type": "mqar", "pairs": 16})` builds one; `register_task` adds your own.

base.py says what a task is, answers.py what the synthetic ones share, and docs/tasks.md what each of them measures.
"""

from hybridzoo.studies.tasks.answers import AnswerTask, LengthConfig, PairsConfig
from hybridzoo.studies.tasks.base import Shown, StudyTask, build_task, list_tasks, register_task
from hybridzoo.studies.tasks.byte_lm import ByteLm, ByteLmConfig
from hybridzoo.studies.tasks.copying import Copy, CopyConfig
from hybridzoo.studies.tasks.language import LanguageConfig, LanguageTask
from hybridzoo.studies.tasks.mad import (
    Compression,
    CompressionConfig,
    Memorisation,
    MemorisationConfig,
    SelectiveCopy,
    SelectiveCopyConfig,
)
from hybridzoo.studies.tasks.mad_recall import FuzzyRecall, FuzzyRecallConfig, NoisyRecall, NoisyRecallConfig
from hybridzoo.studies.tasks.mqar import Mqar, MqarConfig
from hybridzoo.studies.tasks.niah import Niah, NiahConfig
from hybridzoo.studies.tasks.overwrite import Overwrite, OverwriteConfig
from hybridzoo.studies.tasks.state_tracking import StateTracking, StateTrackingConfig
from hybridzoo.studies.tasks.token_lm import TokenLm, TokenLmConfig

__all__ = [
    "AnswerTask",
    "ByteLm",
    "ByteLmConfig",
    "Compression",
    "CompressionConfig",
    "Copy",
    "CopyConfig",
    "FuzzyRecall",
    "FuzzyRecallConfig",
    "LanguageConfig",
    "LanguageTask",
    "LengthConfig",
    "Memorisation",
    "MemorisationConfig",
    "Mqar",
    "MqarConfig",
    "Niah",
    "NiahConfig",
    "NoisyRecall",
    "NoisyRecallConfig",
    "Overwrite",
    "OverwriteConfig",
    "PairsConfig",
    "SelectiveCopy",
    "SelectiveCopyConfig",
    "Shown",
    "StateTracking",
    "StateTrackingConfig",
    "StudyTask",
    "TokenLm",
    "TokenLmConfig",
    "build_task",
    "list_tasks",
    "register_task",
]
