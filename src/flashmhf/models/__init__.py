"""The Hugging Face model family; importing it registers FlashMHF with AutoConfig and the AutoModel classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from flashmhf.models.configuration import FlashMHFConfig, preset_names
from flashmhf.models.former_shapes import register_former_shapes
from flashmhf.models.modeling import (
    FlashMHFForCausalLM,
    FlashMHFForQuestionAnswering,
    FlashMHFForSequenceClassification,
    FlashMHFForTokenClassification,
    FlashMHFModel,
    FlashMHFPreTrainedModel,
)
from flashmhf.models.replaced import ReplacedConfig
from flashmhf.ops import flops  # noqa: F401  (model FLOPs are counted by Trainer and profilers)

__all__ = [
    "FlashMHFConfig",
    "FlashMHFForCausalLM",
    "FlashMHFForQuestionAnswering",
    "FlashMHFForSequenceClassification",
    "FlashMHFForTokenClassification",
    "FlashMHFModel",
    "FlashMHFPreTrainedModel",
    "preset_names",
]

register_former_shapes(FlashMHFModel.__name__)
AutoConfig.register(FlashMHFConfig.model_type, FlashMHFConfig)
AutoConfig.register(ReplacedConfig.model_type, ReplacedConfig)
for _auto, _model in (
    (AutoModel, FlashMHFModel),
    (AutoModelForCausalLM, FlashMHFForCausalLM),
    (AutoModelForSequenceClassification, FlashMHFForSequenceClassification),
    (AutoModelForTokenClassification, FlashMHFForTokenClassification),
    (AutoModelForQuestionAnswering, FlashMHFForQuestionAnswering),
):
    _auto.register(FlashMHFConfig, _model)
