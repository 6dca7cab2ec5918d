"""Data: tasks as text, local files, multi-task sampling, metrics, and the embedded documentation
and checkpoints.

Importing this package does not import transformers.
"""

from mpoe.data.documentation import DocRecord, load_documentation
from mpoe.data.encode import encode_language_modeling, encode_text_to_text
from mpoe.data.metrics import METRICS, average_score, get_metric
from mpoe.data.predict import Evaluation, evaluate_task, generate_texts, language_modeling_loss
from mpoe.data.spec import HubData, TaskSpec
from mpoe.data.stand_in_models import load_stand_in, stand_in_path
from mpoe.data.task import (
    Example,
    Task,
    multitask_batches,
    with_subsets,
    with_validation_test_split,
)
from mpoe.data.tasks import (
    find_spec,
    get_task,
    load_task,
    load_task_from_folder,
    read_task_file,
    register_task,
    task_names,
)

__all__ = [
    "METRICS",
    "DocRecord",
    "Evaluation",
    "Example",
    "HubData",
    "Task",
    "TaskSpec",
    "average_score",
    "encode_language_modeling",
    "encode_text_to_text",
    "evaluate_task",
    "find_spec",
    "generate_texts",
    "get_metric",
    "get_task",
    "language_modeling_loss",
    "load_documentation",
    "load_stand_in",
    "load_task",
    "load_task_from_folder",
    "multitask_batches",
    "read_task_file",
    "register_task",
    "stand_in_path",
    "task_names",
    "with_subsets",
    "with_validation_test_split",
]
