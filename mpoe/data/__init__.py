"""Data: tasks as text, local files, multi-task sampling, metrics, and the embedded documentation
and checkpoints.

Importing this package does not import transformers.
"""

from types import ModuleType as _Module

from mpoe.data.documentation import DocRecord as DocRecord
from mpoe.data.documentation import load_documentation as load_documentation
from mpoe.data.encode import encode_language_modeling as encode_language_modeling
from mpoe.data.encode import encode_text_to_text as encode_text_to_text
from mpoe.data.metrics import METRICS as METRICS
from mpoe.data.metrics import average_score as average_score
from mpoe.data.metrics import get_metric as get_metric
from mpoe.data.predict import Evaluation as Evaluation
from mpoe.data.predict import evaluate_task as evaluate_task
from mpoe.data.predict import generate_texts as generate_texts
from mpoe.data.predict import language_modeling_loss as language_modeling_loss
from mpoe.data.spec import HubData as HubData
from mpoe.data.spec import TaskSpec as TaskSpec
from mpoe.data.stand_in_models import load_stand_in as load_stand_in
from mpoe.data.stand_in_models import stand_in_path as stand_in_path
from mpoe.data.task import Example as Example
from mpoe.data.task import Task as Task
from mpoe.data.task import multitask_batches as multitask_batches
from mpoe.data.task import with_subsets as with_subsets
from mpoe.data.task import with_validation_test_split as with_validation_test_split
from mpoe.data.tasks import find_spec as find_spec
from mpoe.data.tasks import get_task as get_task
from mpoe.data.tasks import load_task as load_task
from mpoe.data.tasks import load_task_from_folder as load_task_from_folder
from mpoe.data.tasks import read_task_file as read_task_file
from mpoe.data.tasks import register_task as register_task
from mpoe.data.tasks import task_names as task_names

__all__ = [
    name for name, value in globals().items() if name[0] != "_" and not isinstance(value, _Module)
]
