"""A staged model whose steps are laid out by the pace that training has, where a fit has a time."""

import math
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from anomalib.data import ImageBatch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from .feature_cache import FeatureCache
from .schedule import TwoStages
from .staged_model import StagedModel
from .time_budget import StepClock, TimeBudget
from .trainer import validation_images

_FIXED = 3.0  # seconds for files
_SETTLED = 0.5  # share of the last stage after which its length is settled


class PacedModel(StagedModel):
    """Trains on the features of a frozen network, as many steps as the time allows.

    A model sets the attribute below where one look at the held-out images is not all, and says what its features are.

    Attributes:
        looks: How often the end of the last stage looks at a held-out image, in images' time.
    """

    looks: int = 1

    def begin_run(self) -> None:
        """Make what a run fills."""
        super().begin_run()
        self.features = FeatureCache(self.compute_features)
        self._clock: StepClock | None = None
        self._longest: TwoStages | None = None  # the schedule whatever the time
        self._end_seconds = 0.0

    @abstractmethod
    def compute_features(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        """What the frozen network says of images ``(N, 3, H, W)``, in maps ``(N, C, h, w)``."""

    def features_of(self, batch: ImageBatch) -> Sequence[torch.Tensor]:
        """The features of a batch; those of images that come again unchanged are computed once."""
        images, paths = cast("torch.Tensor", batch.image), cast("list[str]", batch.image_path)
        return self.compute_features(images) if self._images.vary else self.features(paths, images)

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def lay_out(self, full: TwoStages, begun: int | None) -> None:
        """Choose the run's schedule, see :class:`StagedModel`, and begin to time its steps."""
        super().lay_out(full, begun)
        self._clock, self._longest = None, self.schedule
        if self._budget and not self.record.steps:  # a resumed run keeps its steps
            self._measure_end(self._budget)
            self._clock = StepClock(self.global_step)

    def time_anew(self) -> None:
        """Time the steps again, since others follow."""
        if self._clock:
            self._clock = StepClock(self.global_step)

    def _measure_end(self, budget: TimeBudget) -> None:
        """Find how long it takes to look at held-out and validation images at the end."""
        image = next(self._images.prepared(self._images.held_out[:1], "Measuring the pace"))
        with self.evaluating():
            self.model(image)
            start = time.monotonic()
            self.model(image)
        images = self.looks * len(self._images.held_out) + validation_images(self.trainer)
        needed = _FIXED + images * (time.monotonic() - start)
        # All processes take the first one's figures.
        self._end_seconds, left = self.trainer.strategy.broadcast((needed, budget.remaining))
        if left < 2 * self._end_seconds:
            msg = f"max_time leaves {left:.0f} s; on this machine these images need "
            msg += f"{2 * self._end_seconds:.0f} s at least: raise max_time, or choose smaller images"
            raise ValueError(msg)

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: ImageBatch, batch_idx: int) -> None:
        """Lay out the steps that the time allows when a stage's pace is known."""
        del outputs, batch, batch_idx
        step = self.global_step
        if not self._clock or step >= self.schedule.total:
            return
        paced = self._paced(step, self._clock) if self._clock.tick(step) else None
        if schedule := self.trainer.strategy.broadcast(paced):  # the first process's, at the same step in all
            self.follow(schedule)
            if schedule.begun(step) and schedule.progress(step) < _SETTLED:
                self._clock = StepClock(step)  # a step is faster once the features of all images are known

    def _paced(self, step: int, clock: StepClock) -> TwoStages:
        """The schedule that fits the time that is left, at the pace that the clock has found."""
        longest, kind = cast("TwoStages", self._longest), type(self.schedule)
        fits = max(int((cast("TimeBudget", self._budget).remaining - self._end_seconds) / clock.found), 1)
        if self.schedule.begun(step):
            first = self.schedule.first
            return kind(first, min(step + fits, longest.total) - first)
        if step + fits >= longest.total:
            return longest
        # A step of the last stage is taken for as long as one of the first, so that the time is shared.
        first = step + max(round(fits * longest.first / longest.total), 1)
        return kind(first, max(step + fits - first, 1))

    def teardown(self, stage: str) -> None:
        """Forget what belongs to the fit."""
        super().teardown(stage)
        if stage == "fit":
            self.features.clear()
            self._clock = None
