"""Data: tasks as text, local files, multi-task sampling, metrics, and the embedded documentation and checkpoints.

Importing this package does not import transformers.
"""

from mpoe.data.collate import PaddingCollator
from mpoe.data.detect import load_task_from_folder
from mpoe.data.documentation import DocRecord, Documentation, load_documentation
from mpoe.data.embedded import load_stand_in, stand_in_path
from mpoe.data.encode import encode_language_modeling, encode_text_to_text
from mpoe.data.metrics import METRICS, get_metric, perplexity
from mpoe.data.predict import (
    Evaluation,
    evaluate_beside_baseline,
    evaluate_task,
    generate_texts,
    language_modeling_loss,
)
from mpoe.data.sampler import MultiTaskBatchSampler, TemperatureSampler
from mpoe.data.spec import HubData, TaskSpec
from mpoe.data.splits import (
    split_validation_test,
    with_subsets,
    with_validation_from_train,
    with_validation_test_split,
)
from mpoe.data.task import Example, Task, subset
from mpoe.data.tasks import (
    average_score,
    find_spec,
    get_task,
    load_task,
    read_task_file,
    register_task,
    task_names,
)

__all__ = [
    "METRICS",
    "DocRecord",
    "Documentation",
    "Evaluation",
    "Example",
    "HubData",
    "MultiTaskBatchSampler",
    "PaddingCollator",
    "Task",
    "TaskSpec",
    "TemperatureSampler",
    "average_score",
    "encode_language_modeling",
    "encode_text_to_text",
    "evaluate_beside_baseline",
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
    "perplexity",
    "read_task_file",
    "register_task",
    "split_validation_test",
    "stand_in_path",
    "subset",
    "task_names",
    "with_subsets",
    "with_validation_from_train",
    "with_validation_test_split",
]
