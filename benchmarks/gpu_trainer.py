"""One model in training on a GPU: the recipe, a step (eager, compiled, or replayed as a CUDA graph), validation."""

import functools
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer, get_scheduler

from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.training.compilation import compile_layers
from flashmhf.training.learning_rates import learning_rate_factors, scale_learning_rates
from flashmhf.training.muon import MUON, OPTIMIZERS, Muon, gate_factors, matrices
from flashmhf.training.warmup import default_warmup

ATTENTION = "causal_sdpa"
MODES = ("eager", "graph", "compiled", "compiled graph")
EAGER_STEPS = 4  # before a graph is captured: they allocate the optimizer's state and compile kernels


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every model is trained: the defaults of `flashmhf train`, which a test compares.

    Initialisation is in recipes/scaling/*.json; the warm-up is the package's, a tenth of the steps.

    Args:
        optimizer: "muon" or "adamw", see `flashmhf.training.muon`.
        mup_base_width: with AdamW, the hidden size that the learning rate is for, see
            `flashmhf.training.learning_rates`.
    """

    optimizer: str = MUON
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=lambda: {"min_lr_rate": 0.1})
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    mup_base_width: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected {' or '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.optimizer == MUON and self.mup_base_width is not None:
            raise ValueError(f"mup_base_width: expected None with {MUON}, got {self.mup_base_width}")


class ModelInTraining:
    """A model with its optimizer; a call trains on a batch and returns its loss as a tensor.

    Attributes:
        mode: one of MODES, or "eager: " and the reason why a graph could not be captured.
    """

    def __init__(
        self,
        config: FlashMHFConfig,
        recipe: Recipe,
        *,
        batch: tuple[int, int],
        steps: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        torch.manual_seed(seed)
        AttentionInterface.register(ATTENTION, causal_sdpa)  # without a mask, whose construction synchronizes
        with torch.device(device):
            self.model = FlashMHFForCausalLM._from_config(config, attn_implementation=ATTENTION).train()
        self.recipe, self.device, self.mode = recipe, device, "eager"
        self.optimizer = new_optimizer(self.model, recipe)
        self.schedule = get_scheduler(
            recipe.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=default_warmup(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=recipe.lr_scheduler_kwargs,
        )
        # No cache of cast weights: a graph would keep reading those of its capture.
        self.autocast = functools.partial(
            torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        )
        self.batch = torch.zeros(batch, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None
        self._graph_at: int | None = None  # the step
        self._steps = 0

    def use(self, mode: str) -> None:
        """Selects one of MODES; before the first step."""
        assert mode in MODES
        assert self._steps == 0
        self.mode = mode
        if mode.startswith("compiled"):
            compile_layers(self.model)
        if mode.endswith("graph"):
            self._graph_at = EAGER_STEPS

    def __call__(self, batch: Tensor) -> Tensor:
        self.batch.copy_(batch)
        if self._steps == self._graph_at:
            self._capture()
        if self._graph is None:
            loss = self._step()
        else:
            self._graph.replay()
            assert self._loss is not None
            loss = self._loss.clone()
        self._steps += 1
        self.schedule.step()
        return loss

    def _capture(self) -> None:
        """Makes later steps replays of a graph; if that cannot be, they stay as they are, and `mode` says so."""
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self._loss = self._step()
        except RuntimeError as error:  # an operation that cannot be captured: slower, but still a comparison
            self.mode = f"{self.mode.removesuffix('graph').strip() or 'eager'}: {str(error).splitlines()[0]}"
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._graph = graph

    def _step(self) -> Tensor:
        with self.autocast():
            loss = self.model(self.batch, labels=self.batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def validate(self, batches: list[Tensor]) -> list[float]:
        """Nats/token of each batch (N, T). Never compiled: other shapes would be compiled anew."""
        losses = []
        with torch.compiler.set_stance("force_eager"), self.autocast():
            for batch in batches:
                ids = batch.to(self.device, torch.long)
                losses.append(self.model(ids, labels=ids, use_cache=False).loss)
        return torch.stack(losses).float().tolist()


def new_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Muon or AdamW with the Trainer's parameter groups and this package's learning-rate factors.

    Its learning rates are tensors, which a graph reads anew in every replay.
    """
    device = next(model.parameters()).device
    names = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # a method that does not use its object
    named = list(model.named_parameters())
    decayed = [parameter for name, parameter in named if name in names]
    others = [parameter for name, parameter in named if name not in names]
    groups = [
        {"params": parameters, "weight_decay": weight_decay, "lr": torch.tensor(recipe.learning_rate, device=device)}
        for parameters, weight_decay in ((decayed, recipe.weight_decay), (others, 0.0))
    ]
    options: Any = {"betas": recipe.betas, "fused": True, "capturable": device.type == "cuda"}
    if recipe.optimizer == MUON:
        return Muon(groups, matrices(model), gate_factors(model), **options)
    optimizer = torch.optim.AdamW(groups, **options)
    if recipe.mup_base_width is not None:
        scale_learning_rates(optimizer, learning_rate_factors(model, recipe.mup_base_width))
    return optimizer


def causal_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention with transformers' attention interface; never reads a mask."""
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options.get("scaling"))
    return out.transpose(1, 2).contiguous(), None
