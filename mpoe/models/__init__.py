"""Hugging Face models with MPO experts. Importing this package registers them with Transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from mpoe.models.bert import (
    MPOEBertConfig,
    MPOEBertForMaskedLM,
    MPOEBertForSequenceClassification,
    MPOEBertModel,
)
from mpoe.models.checkpoint import load_mpoe, save_mpoe_only
from mpoe.models.convert import convert_to_mpoe, merge_experts
from mpoe.models.gpt2 import MPOEGPT2Config, MPOEGPT2LMHeadModel, MPOEGPT2Model
from mpoe.models.llama import MPOELlamaConfig, MPOELlamaForCausalLM
from mpoe.models.load_layer import load_layers
from mpoe.models.original import import_original
from mpoe.models.report import mpo_modules, parameter_kind, parameter_report
from mpoe.models.t5 import MPOET5Config, MPOET5ForConditionalGeneration

for _config in (MPOET5Config, MPOEGPT2Config, MPOEBertConfig, MPOELlamaConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModelForSeq2SeqLM.register(MPOET5Config, MPOET5ForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(MPOEGPT2Config, MPOEGPT2LMHeadModel, exist_ok=True)
AutoModelForCausalLM.register(MPOELlamaConfig, MPOELlamaForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(MPOEBertConfig, MPOEBertForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(MPOEBertConfig, MPOEBertForSequenceClassification, exist_ok=True)
AutoModel.register(MPOEGPT2Config, MPOEGPT2Model, exist_ok=True)
AutoModel.register(MPOEBertConfig, MPOEBertModel, exist_ok=True)
# T5 and Llama have one MPOE class each; AutoModel gives it, head included.
AutoModel.register(MPOELlamaConfig, MPOELlamaForCausalLM, exist_ok=True)
AutoModel.register(MPOET5Config, MPOET5ForConditionalGeneration, exist_ok=True)

__all__ = [
    "MPOEBertConfig",
    "MPOEBertForMaskedLM",
    "MPOEBertForSequenceClassification",
    "MPOEBertModel",
    "MPOEGPT2Config",
    "MPOEGPT2LMHeadModel",
    "MPOEGPT2Model",
    "MPOELlamaConfig",
    "MPOELlamaForCausalLM",
    "MPOET5Config",
    "MPOET5ForConditionalGeneration",
    "convert_to_mpoe",
    "import_original",
    "load_layers",
    "load_mpoe",
    "merge_experts",
    "mpo_modules",
    "parameter_kind",
    "parameter_report",
    "save_mpoe_only",
]
