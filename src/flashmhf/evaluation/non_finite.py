"""Models whose values stop being finite: named, instead of text and measures that mean nothing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from flashmhf.errors import RunError


@contextlib.contextmanager
def finite_logits(model: nn.Module) -> Iterator[None]:
    """Within the context, logits with NaN or infinity raise RunError, which names where they come from."""

    def check(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        logits: Tensor = output.logits
        ends = logits.aminmax()
        if not (ends.min.isfinite() and ends.max.isfinite()):
            source = non_finite_source(module, lambda: module.forward(*arguments, **options))
            raise RunError(f"model: expected finite logits, got NaN or infinity; {source}")

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def non_finite_source(model: nn.Module, forward: Callable[[], Any]) -> str:
    """A sentence that names the first module, in the order of execution, whose output is not finite in `forward`."""
    found: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            values = output[0] if isinstance(output, tuple | list) and output else output
            if not found and isinstance(values, Tensor) and values.is_floating_point() and not values.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for one in hooks:
            one.remove()
    return f"the first output that is not finite is that of {found[0]}" if found else "no module's output shows why"
