"""What the Lightning halves of this package's models share: one fit on normal images that goes through stages."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch, ImageBatch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import AnomalibMetric, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Transform
from typing_extensions import Self

from anomalib_raad.evaluation import ProductEvaluator
from anomalib_raad.post_processing import RaadPostProcessor, check_thresholds, gives_verdicts
from anomalib_raad.pre_processing import RaadPreProcessor
from anomalib_raad.precision import check_precision
from anomalib_raad.progress import shown

from .checkpoints import AtomicCheckpointIO, check_archive, check_finite, keep_metrics_of, state_of
from .checks import HELD_OUT_LOSS, check_images, check_monitors, check_transform
from .forecast import Forecast
from .images import NormalImages, training_augmentations
from .modes import evaluating, randomness
from .prediction_guard import PredictionGuard
from .record import Record
from .schedule import TwoStages
from .time_budget import TimeBudget
from .trainer import (
    TidyUp,
    allow_validation,
    datamodule_of,
    is_dev_run,
    monitors_of,
    put_off_validation,
    stop_not_before,
    tile_of,
)

logger = logging.getLogger(__name__)

_UNLIMITED_EPOCHS = {None, -1, 1000}  # Lightning's max_epochs when the user has set none (1000), or no limit (-1)
_WATCHED = 8  # held-out images whose loss is logged at each epoch's end, a small part of an epoch's time

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    # anomalib lists the direct subclasses of AnomalibModule only: models derive from both.
    from lightning.pytorch import LightningModule as Base


class StagedModel(Base):
    """Trains on normal images of a datamodule, some of them held out, in an order that can be resumed.

    Stages are a function of the optimizer step, randomness is one of the run's seed and the step. The last step
    finishes the model before a callback can save it, and validation runs once, on the finished model.

    A model sets the attributes below and ``model``, its torch half, and calls :meth:`begin_run` in its constructor.

    Attributes:
        STEADIER: The settings whose lower values make training steadier, for an error.
        SIZES: Smallest and largest side of an image.
        logged: What training logs in each stage, apart from the loss on held-out images.
        held_out: Share of the training images that are held out.
        calibration_images: At most so many training images serve for what is computed from them.
        shots: Train on so many images alone, see :class:`NormalImages`; ``None``: on all.
        schedule: The run's steps.
        record: What the run has found out.
    """

    STEADIER: ClassVar[str]
    SIZES: ClassVar[tuple[int, int]]

    run_seed: torch.Tensor
    pre_processor: PreProcessor | None
    logged: tuple[str, ...]
    held_out: float
    calibration_images: int
    shots: int | None = None
    schedule: TwoStages
    record: Record

    def begin_run(self) -> None:
        """Make what a run fills."""
        if type(self.pre_processor) is PreProcessor:  # the user's, which would resize otherwise after export
            self.pre_processor = RaadPreProcessor(transform=self.pre_processor.transform)
        self.record = self.new_record()
        self._budget: TimeBudget | None = None
        self._least_steps = 0
        # Everything random in a run follows from this number; -1 until the run has begun.
        self.register_buffer("run_seed", torch.tensor(-1))

    # ------------------------------------------------------------------------------------------ what a model adds

    @classmethod
    @abstractmethod
    def new_record(cls) -> Record:
        """An empty record of the model's own class."""

    @abstractmethod
    def held_out_loss(self, image: torch.Tensor) -> torch.Tensor:
        """The loss of the stage that the run is in, for a held-out normal image ``(1, 3, H, W)``."""

    @abstractmethod
    def finish(self) -> None:
        """Finish the model after the last step."""

    def begin_anew(self) -> None:
        """A fit without checkpoint is a run of its own, from the weights that the model has."""
        self.run_seed.fill_(-1)
        self.record = self.new_record()
        if self.post_processor:  # the thresholds of other data
            for buffer in self.post_processor.buffers():
                if buffer.is_floating_point():
                    buffer.fill_(torch.nan)

    # ---------------------------------------------------------------------------------------------- before training

    def setup(self, stage: str) -> None:
        """Check the settings and the data before training starts."""
        if type(self.trainer.strategy.checkpoint_io) is AnomalibCheckpointIO:  # the user's own stays
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        shown.set(self.trainer.progress_bar_callback is not None)
        if stage != "fit":
            return
        self._budget = TimeBudget.taken_from(self.trainer)
        datamodule = datamodule_of(self.trainer)
        if datamodule is None:
            msg = f"{self.name} splits its training images itself: pass a datamodule to fit, not dataloaders"
            raise ValueError(msg)
        check_precision(self.trainer)
        check_monitors(self.trainer, self.logged)
        check_images(datamodule, gives_verdicts(self.post_processor), self.shots is not None)
        if gives_verdicts(self.post_processor) and not self.trainer.limit_val_batches:
            msg = "limit_val_batches is 0, and the thresholds come from the validation set: leave it out"
            raise ValueError(msg)
        check_transform(self.transform, training_augmentations(datamodule), self.input_size, *self.SIZES)

    def on_fit_start(self) -> None:
        """Fix the run's seed and with it the split and the order of the training images."""
        if self.run_seed >= 0 and self.trainer.ckpt_path is None:
            if self.trainer.global_step:
                msg = f"this engine has trained {self.trainer.global_step} steps already: give it the checkpoint to go "
                msg += "on from (ckpt_path), or fit anew with a new Engine"
                raise ValueError(msg)
            self.begin_anew()
        if self.run_seed < 0:
            self.run_seed.fill_(self.trainer.strategy.broadcast(torch.initial_seed() % 2**31))
        self._images = NormalImages(
            datamodule_of(self.trainer),
            self.held_out,
            int(self.run_seed),
            self.calibration_images,
            self.transform,
            self.device,
            self.shots,
        )
        self._images.take_over_training(
            lambda: self.trainer.global_step * self.trainer.accumulate_grad_batches,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

    def lay_out(self, full: TwoStages, begun: int | None) -> None:
        """Choose the run's schedule by the trainer's limits and put off validation to the end.

        Args:
            full: The model's own lengths, which count where the trainer has no limits and give their proportion where
                it has some.
            begun: The step at which the second stage has begun, if it has.

        Raises:
            ValueError: If the run is finished already, or a stage would have no step.
        """
        if self._budget and self.record.steps and self.global_step >= sum(self.record.steps):
            self.record.steps = None  # a finished run is given more time, which goes to the second stage
        self._least_steps = self.trainer.min_steps or 0
        self.schedule = self._limited(full, begun)
        stop_not_before(self.trainer, self.schedule.total)
        # The only use of validation is to set the thresholds of the finished model: it runs once, at the end.
        put_off_validation(self.trainer)

    def _limited(self, full: TwoStages, begun: int | None) -> TwoStages:
        kind = type(full)
        unlimited = self.trainer.max_steps == -1 and self.trainer.max_epochs in _UNLIMITED_EPOCHS
        if self.record.steps and (self._budget or unlimited):
            self._check_unfinished(sum(self.record.steps))
            return kind(*self.record.steps)
        total = int(min(self.trainer.estimated_stepping_batches, torch.iinfo(torch.int64).max))
        if unlimited:
            total = min(total, full.total)
        if begun is not None:  # all that is left is the second stage, also with more steps than at first
            if unlimited:
                self._check_unfinished(total)
            return kind(begun, total - begun)
        if is_dev_run(self.trainer) and total == 1:
            return kind(0, 1)  # one batch, of the second stage
        return kind.scaled(full.first, full.second, total)

    def _check_unfinished(self, total: int) -> None:
        if self.global_step >= total:
            msg = f"the run is finished after {total} steps; to train it on give it more max_steps, or max_time"
            raise ValueError(msg)

    # ---------------------------------------------------------------------------------------------------- training

    def stop_if_asked(self, begun: bool) -> None:
        """End the stage if a callback has asked the trainer to stop; the model is finished all the same."""
        if not self.trainer.should_stop or self.global_step < self._least_steps:
            return
        self.trainer.should_stop = False
        step, first = self.global_step, self.schedule.first
        kind = type(self.schedule)
        self.follow(kind(first, step + 1 - first) if begun else kind(step, self.schedule.total - step))
        logger.warning("%s was asked to stop after %d steps: now %s.", self.name, step, self.schedule)

    def follow(self, schedule: TwoStages) -> None:
        """Go on by another schedule, which a run with a time budget remembers."""
        self.schedule = schedule
        if self._budget or self.record.steps:
            self.record.steps = schedule.first, schedule.second
        stop_not_before(self.trainer, schedule.total)

    def step_randomness(self, batch_idx: int) -> AbstractContextManager[None]:
        """Random numbers that follow from the run's seed and the step."""
        # A run resumed from the checkpoint of an epoch's end counts its first batches on from that epoch.
        turn = batch_idx % self.trainer.accumulate_grad_batches
        return randomness([int(self.run_seed), self.global_step, turn, self.global_rank], self.device)

    def log_losses(self, loss: torch.Tensor, terms: Mapping[str, torch.Tensor | None], stage: int) -> None:
        """Log a step's loss, its terms, of which those that the settings leave out are None, and its stage's number.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        present = {name: term for name, term in terms.items() if term is not None}
        if not torch.isfinite(loss):
            self._stop_at_non_finite("loss", ", ".join(f"{name}={term.item()}" for name, term in present.items()))
        self.log("stage", float(stage), prog_bar=True)
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({f"train_{name}": term for name, term in present.items()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite can spoil the weights."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._stop_at_non_finite("gradient", f"norm={float(norm)}")

    def _stop_at_non_finite(self, what: str, details: str) -> None:
        msg = (
            f"the {what} of step {self.global_step} is not finite: {details}. The weights are those of the last good "
            f"step. Lower {self.STEADIER}."
        )
        raise FloatingPointError(msg)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and finish the model in the last step, before any callback can save a checkpoint of it."""
        super().optimizer_step(*args, **kwargs)
        if self.global_step + 1 == self.schedule.total:
            self.finish()
            allow_validation(self.trainer)
            self.trainer.should_stop = True  # lets Lightning validate even in the middle of an epoch

    def on_train_epoch_end(self) -> None:
        """Log the loss on held-out normal images as ``held_out_loss``, where somebody looks at it."""
        if not self.loggers and HELD_OUT_LOSS not in monitors_of(self.trainer):
            return
        images = self._images.prepared(self._images.held_out[:_WATCHED], "Loss on held-out images")
        with self.evaluating(), randomness([int(self.run_seed)], self.device):  # the same random numbers every time
            losses = [self.held_out_loss(image) for image in images]
        self.log(HELD_OUT_LOSS, torch.stack(losses).mean(), prog_bar=True)

    def teardown(self, stage: str) -> None:
        """Give the datamodule its own training loader back."""
        if stage == "fit":
            allow_validation(self.trainer)
            if images := self.__dict__.pop("_images", None):  # the datamodule must not be pickled with the model
                images.release()

    # ----------------------------------------------------------------------------------------------- ends of stages

    def end_stage(self, name: str, step: int, figures: dict[str, Any], shown_figures: dict[str, float]) -> None:
        """Note how a stage has ended, tell the loggers, and save the model of a stage that is not the last.

        Args:
            name: Of the stage, and of its checkpoint.
            step: Optimizer steps so far.
            figures: For the record.
            shown_figures: Those of them that loggers get.
        """
        self.record.stages[name] = {"stage": name, "step": step, **figures, **shown_figures}
        for metrics_logger in self.loggers:
            metrics_logger.log_metrics({f"{name}_{key}": value for key, value in shown_figures.items()}, step=step)
        callback = self.trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) and not is_dev_run(self.trainer) else None
        if folder and step < self.schedule.total:
            self.trainer.save_checkpoint(Path(folder) / f"{name}{tile_of(self.trainer)}.ckpt")

    def once(self, change: Callable[[], None]) -> None:
        """Let one process change the model and give all others the result."""
        if self.trainer.is_global_zero:
            change()
        if self.trainer.world_size > 1:
            state, self.record = self.trainer.strategy.broadcast((self.model.state_dict(), self.record))
            self.model.load_state_dict(state)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode in the trainer's precision, without gradients."""
        return evaluating(self.model, self.trainer)

    @property
    def results(self) -> Path:
        """The folder for what a run reports; each model of a tiled ensemble has one."""
        return Path(self.trainer.default_root_dir) / tile_of(self.trainer)

    @property
    def transform(self) -> Transform | None:
        """What the pre-processor does to images."""
        return self.pre_processor.transform if self.pre_processor else None

    # ---------------------------------------------------------------------------------------------- anomalib's hooks

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Take plain tensors of images as well, ``(N, 3, H, W)`` in [0, 1], alone or first in a list."""
        del dataloader_idx
        image = batch[0] if isinstance(batch, list | tuple) and batch else batch
        return ImageBatch(image=image) if isinstance(image, torch.Tensor) else batch

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict anomaly maps and scores, from which the post-processor takes its thresholds."""
        del args, kwargs
        # A processor takes one image at a time: memory for the feature maps of many is handed out anew at every layer,
        # page by page, which costs a quarter of the time at a batch of 16.
        images = cast("torch.Tensor", batch.image)
        pieces = images.split(1) if self.device.type == "cpu" else [images]
        predictions = [self.model(piece) for piece in pieces]
        scores = torch.cat([prediction.pred_score for prediction in predictions])
        maps = torch.cat([prediction.anomaly_map for prediction in predictions])
        return batch.update(pred_score=scores, anomaly_map=maps)

    def configure_callbacks(self) -> list[Callback]:
        """anomalib's, and before them a guard that sees images as they are on the disk."""
        return [PredictionGuard(), Forecast(), TidyUp(), *cast("list[Callback]", super().configure_callbacks())]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the record with the model, if its weights are finite."""
        super().on_save_checkpoint(checkpoint)
        check_finite(self.model)
        checkpoint[self.name] = self.record.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the record; raises ``ValueError`` for a checkpoint of another model or format."""
        super().on_load_checkpoint(checkpoint)
        self.record = type(self.record).from_state(state_of(checkpoint, self.name))
        keep_metrics_of(self, checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Load a checkpoint, see anomalib's method; raises ``ValueError`` for a damaged file."""
        check_archive(checkpoint_path)
        return cast("Self", super().load_from_checkpoint(checkpoint_path, *args, **kwargs))

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export for anomalib's torch inferencer; raises ``ValueError`` for a model that is not finished."""
        check_thresholds(self.post_processor)
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # Lightning's returns something else
        """Export to ONNX as anomalib does; raises ``ValueError`` for a model that is not finished."""
        check_thresholds(self.post_processor)
        return super().to_onnx(*args, **kwargs)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Anomalib's metrics, of each product as well where there are several."""
        metrics = AnomalibModule.configure_evaluator().test_metrics
        return ProductEvaluator(test_metrics=list(cast("Iterable[AnomalibMetric]", metrics)))

    def configure_post_processor(self) -> PostProcessor:
        """anomalib's, with scores that are not cut off."""
        return RaadPostProcessor()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training there is nothing to validate. And batches are shared out here."""
        return {"num_sanity_val_steps": 0, "use_distributed_sampler": False}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images only."""
        return LearningType.ONE_CLASS
