"""Adapters, made by a rule, that run Transformers' own model tests on our classes and on the dense
ones.

Not collected here: `tools/external_suites.sh` copies this file beside nothing else, as
``test_models.py``, and puts a checkout of Transformers on the path. ``MPOE_FAMILIES`` (default:
every family) names the families to run, ``MPOE_SHAPE`` (default: separable) the shape of the
experts.
"""

import importlib
import os
import unittest
from unittest import mock

from transformers.models.auto import modeling_auto

import mpoe.models
from mpoe.config import MPOEConfig
from mpoe.models.classes import HEADS, classes_of
from mpoe.models.table import TABLE

# folder of the checkout, where it is not the family's name
FOLDERS = {"gemma3_text": "gemma3", "deberta-v2": "deberta_v2"}
OTHERS = "Integration Generation Embeddings Vision EncoderOnly Standalone".split()
SETTINGS = {
    "num_experts": 4,
    "shape": os.environ.get("MPOE_SHAPE", "separable"),
    "backend": "eager",
}


def _dense_test(module):
    """The test class of a family's text model."""
    return next(
        cls
        for name, cls in vars(module).items()
        if isinstance(cls, type)
        and issubclass(cls, unittest.TestCase)
        and cls.__module__ == module.__name__
        if not any(word in name for word in OTHERS)
    )


def _with_experts(get_config, config_class):
    """A tester's method whose configuration is that of a mixture."""

    def changed(*args, **kwargs):
        config = get_config(*args, **kwargs)
        if type(config) is not config_class.__bases__[1]:
            return config
        values = config.to_dict()
        for key in ("model_type", "architectures", "transformers_version"):
            values.pop(key, None)
        return config_class(**values, mpoe=MPOEConfig(**SETTINGS), output_router_logits=False)

    return changed


def _adapted(base, module, model_type):
    ours = classes_of(model_type)
    config_class = next(iter(ours.values())).config_class
    names = {dense.__name__: made for dense, made in ours.items() if dense.__name__ in vars(module)}

    class Adapted(base):
        def setUp(self):
            super().setUp()
            tested = [cls for cls in self.all_model_classes if cls in ours]
            self.all_model_classes = tuple(ours[cls] for cls in tested)
            self.pipeline_model_mapping = {}
            tester = self.model_tester
            for name, value in vars(type(tester)).items():
                if isinstance(value, type) and value in ours:
                    setattr(tester, name, ours[value])

            for name in dir(tester):
                if name.startswith("get_") and "config" in name:
                    setattr(tester, name, _with_experts(getattr(tester, name), config_class))
            # The family's own checks build its classes by name; the shared ones know a class's head
            # by its name in Transformers' tables.
            patches = [mock.patch.dict(vars(module), names)]
            for table in HEADS.values():
                known = getattr(modeling_auto, table)
                name = known.get(model_type)
                if name is not None:
                    name = f"MPOE{name if isinstance(name, str) else name[0]}"
                    patches.append(mock.patch.dict(known, {config_class.model_type: name}))
            for patch in patches:
                patch.start()
                self.addCleanup(patch.stop)

    return Adapted


for _family in os.environ.get("MPOE_FAMILIES", " ".join(TABLE)).split():
    _folder = FOLDERS.get(_family, _family)
    _module = importlib.import_module(f"tests.models.{_folder}.test_modeling_{_folder}")
    _base = _dense_test(_module)
    for _kind, _made in (
        ("MPOE", _adapted(_base, _module, _family)),
        ("Dense", type("Dense", (_base,), {})),
    ):
        _made.__name__ = _made.__qualname__ = f"{_kind}_{_family.replace('-', '_')}"
        _made.__module__ = __name__
        globals()[_made.__name__] = _made
del _base, _made
assert mpoe.models.__name__ == "mpoe.models"
