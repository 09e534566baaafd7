"""Has `from_pretrained` accept K, U and V in their former shape (`flashmhf.layers.former_shapes`)."""

from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from flashmhf.layers.former_shapes import ROWS, from_former_shape

Tensors = dict[str, Any]  # lists of tensors


class FromFormerShape(ConversionOps):
    """Loads either shape; what is saved is the present one."""

    def convert(
        self, input_dict: Tensors, source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> Tensors:
        model: PreTrainedModel = options["model"]
        layer = model.get_submodule(options["full_layer_name"].rpartition(".")[0])
        (tensors,) = input_dict.values()
        former = getattr(layer, "rows_shape", None)  # PKV has a k and a v, too
        converted = tensors if former is None else [from_former_shape(tensor, former) for tensor in tensors]
        return {target_patterns[0]: converted}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Unchanged()


class _Unchanged(ConversionOps):
    def convert(
        self, input_dict: Tensors, source_patterns: list[str], target_patterns: list[str], **options: Any
    ) -> Tensors:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def register_former_shapes(model_class: str) -> None:
    """Registers the conversion for models of this class and for those that contain one."""
    conversions: list[WeightConverter | WeightRenaming] = [
        WeightConverter(rf"mlp\.{name}(?!\w)", f"mlp.{name}", [FromFormerShape()]) for name in ROWS
    ]
    register_checkpoint_conversion_mapping(model_class, conversions, overwrite=True)
