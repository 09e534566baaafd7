"""The plain module in a LightningModule: trained, saved and loaded by Lightning's own Trainer."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flashmhf import FlashMHF
from tiny import tiny_model


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = FlashMHF(32, 4, 3, 20, q_norm=True, init="scaled")

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(num_subnetworks=3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.model(batch[0], labels=batch[0]).loss

    configure_optimizers = Regression.configure_optimizers


def train(module: lightning.LightningModule, *tensors: Tensor, folder, steps: int = 10) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "deterministic": True}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(*tensors), batch_size=8))
    return trainer


@torch.no_grad()
def loss_of(module: lightning.LightningModule, *tensors: Tensor) -> float:
    return float(module.training_step(list(tensors)))


def test_a_layer_learns_and_is_loaded_from_lightnings_checkpoint(tmp_path):
    module, x = Regression(), torch.randn(80, 5, 32)
    before = loss_of(module, x, x.tanh())
    trainer = train(module, x, x.tanh(), folder=tmp_path)
    assert loss_of(module, x, x.tanh()) < 0.9 * before
    trainer.save_checkpoint(tmp_path / "layer.ckpt")
    loaded = Regression.load_from_checkpoint(tmp_path / "layer.ckpt")
    assert torch.equal(loaded.layer(x), module.layer(x))


def test_a_language_model_learns(tmp_path):
    module, ids = LanguageModel(), torch.arange(9).repeat(80, 1)
    before = loss_of(module, ids)
    train(module, ids, folder=tmp_path)
    assert loss_of(module, ids) < 0.9 * before
