"""K, U and V of a FlashMHF layer are (H_kv E, F, D); in former checkpoints they were (H_kv, E, F, D)."""

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor, nn
from torch.optim import Optimizer

ROWS = ("k", "u", "v")


def former_shapes(module: nn.Module) -> dict[str, Size]:
    """The former shape of every K, U and V in `module`, by the parameter's name."""
    return {
        f"{prefix}.{name}" if prefix else name: layer.rows_shape
        for prefix, layer in module.named_modules()
        if isinstance(getattr(layer, "rows_shape", None), Size)
        for name in ROWS
    }


def from_former_shape(tensor: Tensor, former: Size) -> Tensor:
    """A tensor of the former shape in the present one; any other as it is."""
    return tensor.flatten(0, 1) if tensor.shape == former else tensor


def accept_former_shapes(optimizer: Optimizer, model: nn.Module) -> None:
    """Has `optimizer.load_state_dict` accept what an optimizer kept of K, U and V in their former shape."""

    def convert(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if any(isinstance(key, str) for key in state_dict["state"]):
            return state_dict  # by names, as a sharded checkpoint is loaded, which has been converted
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {**state_dict, "state": in_present_shapes(state_dict["state"], order, model)}

    optimizer.register_load_state_dict_pre_hook(convert)


def in_present_shapes(
    state: dict[int, dict[str, Any]], parameters: Sequence[Tensor], model: nn.Module
) -> dict[int, dict[str, Any]]:
    """An optimizer's state, by the number of the parameter among `parameters`, without former shapes."""
    shapes = former_shapes(model)
    by_parameter = {id(parameter): shapes[name] for name, parameter in model.named_parameters() if name in shapes}
    former = [by_parameter.get(id(parameter)) for parameter in parameters]

    def convert(value: Any, shape: Size | None) -> Any:
        return value if shape is None or not isinstance(value, Tensor) else from_former_shape(value, shape)

    return {
        number: {name: convert(value, former[number]) for name, value in values.items()}
        for number, values in state.items()
        if number < len(former)
    }
