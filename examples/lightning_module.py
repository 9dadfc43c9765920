"""Train a LightningModule with an effective batch of 256."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoaccum.integrations.lightning import ExactAccumulation


class Classifier(LightningModule):
    """A small network on 784 inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        """Return the mean loss of a batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        """Return the optimizer, and a scheduler that is stepped with it."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


torch.manual_seed(0)
data = TensorDataset(torch.randn(1_050, 784), torch.randint(10, (1_050,)))
loader = DataLoader(data, batch_size=32, shuffle=True)
exact = ExactAccumulation(target_batch=256)
trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[exact])
trainer.fit(Classifier(), loader)
print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['train_loss']:.3f}")
