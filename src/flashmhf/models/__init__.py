"""The Hugging Face model family; importing it registers FlashMHF with AutoConfig and the AutoModel classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from flashmhf.models.configuration import FlashMHFConfig
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
from flashmhf.names import preset_names
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
AutoModel.register(FlashMHFConfig, FlashMHFModel)
# Trainer (label smoothing) and pipelines look for a class by its name in these tables, which `register` does not fill.
for _auto, _model, _names in (
    (AutoModelForCausalLM, FlashMHFForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        AutoModelForSequenceClassification,
        FlashMHFForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForTokenClassification,
        FlashMHFForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    (
        AutoModelForQuestionAnswering,
        FlashMHFForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
):
    _auto.register(FlashMHFConfig, _model)
    _names[FlashMHFConfig.model_type] = _model.__name__
