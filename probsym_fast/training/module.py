"""Training and validation steps of a task."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import distributed
from torch.distributed.tensor import DTensor

from probsym_fast._autocast import promoted
from probsym_fast._checkpointing import restored_buffers
from probsym_fast.draws import seed_generators, seeded
from probsym_fast.models.predictions import mapped
from probsym_fast.training import optimisation
from probsym_fast.training.faults import too_large
from probsym_fast.training.parallel import Layout, spread
from probsym_fast.training.settings import Training
from probsym_fast.training.task import Task


class TrainingModule(L.LightningModule):
    """Trains the task's `total`. Noise and dropout depend only on (seed, batch, share of the batch).

    fresh: False if a checkpoint will overwrite the model's weights, see `Task.model`.
    """

    def __init__(self, task: Task, fresh: bool = True):
        super().__init__()
        self.task, self.model = task, task.model(fresh)
        self.training_settings: Training = task.config.training
        self.shown = {f"train/{task.measure}", f"valid/{task.measure}", task.monitor.key}
        self.layout = Layout(1, 1, 0)
        self._at_hand: tuple[Any, int] | None = None  # current training batch and its number
        self._validated: list[tuple[Any, Any]] = []  # (prediction, target) of each batch, for whole_set_measures

    def configure_model(self) -> None:
        spread(self.model, self.training_settings, self.layout, self.trainer.strategy.root_device.type)

    def forward(self, inputs: Any, samples: int, generator: torch.Generator | None = None):
        return self.model(inputs, samples, generator)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        settings = self.training_settings
        number = self.global_step * settings.accumulate + index % settings.accumulate
        number = number * self.layout.data + self.layout.place
        self._at_hand = batch, number
        prediction, target, loss, penalties = self._predict(batch, number)
        self._log("train", loss, prediction, target, on_step=False)
        if settings.log_every is not None:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log_dict({f"step/{self.task.measure}": loss.detach(), "step/lr": rate}, on_step=True, on_epoch=False)
        for name, value in penalties.items():
            count = self.task.count(target)
            self._mean(f"train/{name}", value, batch_size=count, on_step=False)
        return self.task.total(loss, penalties)

    def _predict(self, batch: Any, number: int) -> tuple[Any, Any, torch.Tensor, dict[str, torch.Tensor]]:
        """Prediction, target, loss and penalties of a training batch; its number seeds the noise."""
        seed = self.task.config.seed
        seed_generators(seeded(seed, "dropout", number).initial_seed())  # dropout draws from the global generator
        inputs, target = self.task.inputs(batch)
        generator = seeded(seed, "train", number)
        prediction, penalties = self.model(inputs, self.task.config.samples.train, generator)
        return prediction, target, self.task.loss(prediction, target), penalties

    def backward(self, loss: torch.Tensor, *arguments: Any, **settings: Any) -> None:
        """With chunks "auto", a step that runs out of memory in backward is repeated in smaller chunks, same noise.

        Several processes wait for each other's gradients, and "16-mixed" scales the loss; either cannot repeat: a Fault.
        """
        if self.model.chunks.size != "auto":
            super().backward(loss, *arguments, **settings)
            return
        samples = self.task.config.samples.train
        if self.trainer.world_size > 1 or self.trainer.precision == "16-mixed":
            try:
                super().backward(loss, *arguments, **settings)
            except torch.OutOfMemoryError as error:
                raise too_large(self.model.chunks.size_for(samples), self.trainer) from error
            return
        first = [loss]

        def step() -> None:
            this = first.pop() if first else self._again()
            try:
                super(TrainingModule, self).backward(this, *arguments, **settings)
            except torch.OutOfMemoryError:
                this.detach_()  # the trainer holds the loss, which holds its whole graph
                raise

        self.model.step_with_smaller_chunks(step, samples)

    def _again(self) -> torch.Tensor:
        """The loss of the current batch once more, without updating running statistics again."""
        assert self._at_hand is not None  # set by `training_step`
        with self.trainer.precision_plugin.train_step_context(), restored_buffers(self.model):
            _, _, loss, penalties = self._predict(*self._at_hand)
        return self.task.total(loss, penalties) / self.training_settings.accumulate

    def on_validation_epoch_start(self) -> None:
        self._validated = []

    def validation_step(self, batch: Any, index: int) -> None:
        inputs, target = self.task.inputs(batch)
        step = index * self.layout.data + self.layout.place
        generator = seeded(self.task.config.seed, "valid", step)
        seed_generators(seeded(self.task.config.seed, "valid patches", step).initial_seed())
        with torch.autocast(self.device.type, enabled=False):  # float32, as in the test
            prediction, _ = self.model(inputs, self.task.config.samples.valid, generator)
            self._log("valid", self.task.loss(prediction, target), prediction, target)
        if self.task.whole_set_measures:
            wide = mapped(lambda x: x.to(promoted(x.dtype, torch.float32)).cpu(), prediction)
            self._validated.append((wide, move_data_to_device(target, "cpu")))

    def on_validation_epoch_end(self) -> None:
        if not self.task.whole_set_measures:
            return
        shares = [self._validated]
        if self.trainer.world_size > 1:
            shares = [[] for _ in range(self.trainer.world_size)]
            distributed.all_gather_object(shares, self._validated)
            shares = shares[:: self.layout.samples]  # the others hold the same graphs
        self._validated = []
        # batches in order; within a batch, the processes' parts in turn
        parts = [part for batch in zip_longest(*shares) for part in batch if part is not None]
        predictions, targets = zip(*parts, strict=True)
        for name, value in self.task.measures(*self.task.join(list(predictions), list(targets))).items():
            self._mean(f"valid/{name}", float(value), batch_size=1, prog_bar=f"valid/{name}" in self.shown)

    def _log(self, stage: str, loss: torch.Tensor, prediction: Any, target: Any, **where: bool) -> None:
        measures = (
            {} if self.task.whole_set_measures else self.task.measures(mapped(torch.Tensor.detach, prediction), target)
        )
        for name, value in (measures | {self.task.measure: loss}).items():
            key, count = f"{stage}/{name}", self.task.count(target)
            self._mean(key, value, batch_size=count, prog_bar=key in self.shown, **where)

    def _mean(self, name: str, value: Any, batch_size: int, **where: Any) -> None:
        """A mean over the epoch, for `EpochRows` and the checkpoints."""
        whole = batch_size * self.trainer.world_size  # Lightning rounds the processes' mean size down
        self.log(name, value, on_epoch=True, sync_dist=True, logger=False, batch_size=whole, **where)

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        settings = self.training_settings
        optimizer = optimisation.optimizer(self.model, settings)
        if not (settings.warmup or settings.warmup_steps or settings.decay != "none"):
            return optimizer
        rates = optimisation.schedule(optimizer, settings, len(self.task.loader("train")))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        if self.training_settings.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training_settings.clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self._mean("train/gradient_norm", norm, batch_size=1, on_step=False)
