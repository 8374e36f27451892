"""A Lightning module, trained on a session; its scheduler and its early stop look at an evaluation.

`lightning_script.py SAMPLES`: so many in each batch of a rank.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import muster


class Net(lightning.LightningModule):
    """Says whether the sum of four numbers is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = cross_entropy(self.layers(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", cross_entropy(self.layers(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


with muster.Session(seed=3) as session:
    points = torch.randn(92, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(points, (points.sum(1) > 0).long())
    trainer = lightning.Trainer(
        **muster.lightning.devices(session), max_epochs=2, val_check_interval=4, log_every_n_steps=1, logger=False,
        callbacks=[EarlyStopping("val_loss", patience=4)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=session.run,
    )  # fmt: skip
    muster.lightning.attach(trainer, session)
    trainer.fit(Net(), DataLoader(data, batch_size=int(sys.argv[1]), shuffle=True), DataLoader(data, batch_size=16))
