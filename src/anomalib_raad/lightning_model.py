"""RAAD as an anomalib model: the hooks that carry a fit through its three stages."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin.utils import create_export_root
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from lightning_utilities.core.imports import module_available
from torchvision.transforms.v2 import Normalize, Resize
from tqdm import tqdm

from .attention import attention_bias
from .checkpoints import AtomicCheckpointIO, check_archive
from .closed_form import equalize_last_input_, scale_last_input_, solve_student_
from .data.drift import Ranges, ranges
from .data.guard import PredictionGuard
from .data.penalty import PenaltyImages
from .data.readable import describe, unreadable
from .data.training import NormalImages
from .export.projection import project_
from .figures import StageVisualizer, log_figures
from .initialization import AUTOENCODER_STEPS, train_autoencoder_
from .post_processing import RaadPostProcessor
from .pre_processing import RaadPreProcessor
from .precision import warn_of_slow_precision
from .quantization.layers import dequantize_, last_layer, learned_steps, quantizable_layers
from .quantization.recipe import DEFAULT_AVERAGE_BITS, Allocation, Outcome, aligned_weights, model_bytes, quantize_
from .quantization.reconstruction import Reconstruction
from .report import write_report
from .stages import Schedule, Stage
from .teacher.cache import FeatureCache
from .teacher.weights import load_teacher_
from .torch_model import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, RaadModel

logger = logging.getLogger(__name__)

_FORMAT = 4  # of checkpoints; raised when an older version can no longer read them
_UNLIMITED_EPOCHS = {None, -1, 1000}  # Lightning's max_epochs when the user has set none (1000), or no limit (-1)
_NEEDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a positive number up to 1": (lambda x: 0 < x <= 1, ("lr", "finetune_lr")),
    "zero or a positive number": (
        lambda x: 0 <= x < math.inf,
        ("weight_decay", "lambda_st", "lambda_stae", "lambda_ae"),
    ),
    "a whole number from 1": (
        lambda x: x >= 1 and isinstance(x, Integral),
        ("train_steps", "finetune_steps", "calibration_images"),
    ),
    "a whole number from 0": (lambda x: x >= 0 and isinstance(x, Integral), ("reconstruction_iterations",)),
    "a share between 0 and 1": (lambda x: 0 < x < 1, ("held_out",)),
    "a share from 0 to 1": (lambda x: 0 <= x <= 1, ("lr_decay",)),
    "a quantile in [0, 1)": (lambda x: 0 <= x < 1, ("p_hard",)),
}
_EQUALIZED_IMAGES = 32  # whose largest values equalize the channels that enter the student's last layer
_PACE_STEPS = (5, 25)  # batches between which the pace is taken for the forecast of the run's length


class Raad(AnomalibModule):
    """RAAD: recalibrating the attention of industrial anomaly detection by quantization.

    One ``fit`` trains EfficientAD's student and autoencoder on normal images, quantizes teacher, student and
    autoencoder with bits chosen by hierarchical quantization scoring, and fine-tunes through the quantizers. The last
    checkpoint holds the finished model.

    Paper: https://arxiv.org/abs/2412.08189

    Args:
        teacher: ``bundled``, ``efficientad`` (anomalib's official weights, downloaded) or the path of a weights file.
        model_size: ``small`` or ``medium``.
        padding: Zero-pad the convolutions of teacher and student.
        lr: Learning rate of stage 1 (EfficientAD's; paper of RAAD: 1e-5).
        lr_decay: The last share of either stage runs at a tenth of its learning rate (EfficientAD: 0.05); 0 for
            constant rates.
        finetune_lr: Learning rate of stage 3 (paper: 1e-5, for 60,000 steps).
        weight_decay: Adam's weight decay.
        train_steps: Optimizer steps of stage 1, when the trainer's limits allow and ask for no other length; otherwise
            the stages share the trainer's steps in this proportion.
        finetune_steps: Optimizer steps of stage 3, likewise.
        p_hard: Quantile of the hard-feature selection in Eq. 5.
        lambda_st: Weight of L_ts in Eq. 6.
        lambda_stae: Weight of L_aes in Eq. 6.
        lambda_ae: Weight of L_tae in Eq. 6.
        penalty_dir: Folder with images of anything but the part, for EfficientAD's penalty. ``None``: no penalty.
        normalize_maps: Normalise the two maps by their quantiles on held-out normal images before averaging them.
        bits: ``None`` lets HQS choose; a number quantizes every inner layer of teacher and student to as many bits; a
            mapping names the bits of single layers.
        average_bits: HQS takes bits away from the layers with the lowest scores until a weight of teacher and student
            has at most so many on average.
        activation_bits: Bits of what enters each layer; ``None``: as many as its weights, the literal reading of the
            paper. 8 cost neither bytes nor time, since integer kernels compute in 8 bits.
        first_last_bits: Bits of the first and last layer of teacher and student.
        autoencoder_bits: Bits of the autoencoder.
        hqs_thresholds: Limits of phi, instead of ``average_bits``: scores below the first get 2 bits, then 3, 4, and
            from the last on 8.
        reconstruction_iterations: Optimizer steps in which a block of teacher or student learns its rounding (BRECQ);
            0 rounds to the nearest grid point. Blocks of 8 bits are always rounded to the nearest.
        learn_steps: Stage 3 learns the quantizers' steps beside the weights (LSQ), at the same learning rate; a step of
            stage 3 then takes 1.15 times as long.
        finetune_float: Stage 3 goes on in floating point from the quantized weights, and the finished model is not
            quantized: the paper can be read so.
        fisher: Weigh the channels of a block's output by their Fisher information, Eq. 3; otherwise all alike.
        closed_form: Begin stage 1 with a hundred steps of the autoencoder alone, and end each stage by solving the
            student's last layer: ridge regression of its trained features onto what it is to learn. Few steps are then
            enough. Stage 3 goes on from the layer as it was trained, not from the solution.
        held_out: Share of the normal training images held out for scores and map quantiles, at least one image.
        calibration_images: At most so many training images serve for the teacher's channel statistics, the solved last
            layer and reconstruction, the first 32 of them for the quantizers' grids.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If a setting is out of its range; the message names it.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Raad
        >>> Engine(max_steps=2000).train(Raad(), datamodule=MVTecAD(train_batch_size=1))  # doctest: +SKIP
    """

    model: RaadModel
    run_seed: torch.Tensor

    def __init__(
        self,
        teacher: str | Path = "bundled",
        model_size: str = "small",
        padding: bool = False,
        lr: float = 1e-4,
        lr_decay: float = 0.2,
        finetune_lr: float = 1e-4,
        weight_decay: float = 1e-5,
        train_steps: int = 70_000,
        finetune_steps: int = 60_000,
        p_hard: float = 0.999,
        lambda_st: float = 1.0,
        lambda_stae: float = 1.0,
        lambda_ae: float = 1.0,
        penalty_dir: str | Path | None = None,
        normalize_maps: bool = True,
        bits: int | dict[str, int] | None = None,
        average_bits: float = DEFAULT_AVERAGE_BITS,
        activation_bits: int | None = 8,
        first_last_bits: int = 8,
        autoencoder_bits: int = 8,
        hqs_thresholds: tuple[float, float, float] | None = None,
        reconstruction_iterations: int = 300,
        fisher: bool = True,
        learn_steps: bool = False,
        finetune_float: bool = False,
        closed_form: bool = True,
        held_out: float = 0.1,
        calibration_images: int = 128,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        for need, (fits, names) in _NEEDS.items():
            for name in names:
                value = self.hparams[name]
                if not isinstance(value, Real) or not fits(value):
                    msg = f"{name} is {value!r}; {need} is needed"
                    raise ValueError(msg)
        self.model = RaadModel(model_size=model_size, padding=padding, p_hard=p_hard)
        self.allocation = Allocation(
            bits, first_last_bits, autoencoder_bits, hqs_thresholds, average_bits, activation_bits
        )
        weights = aligned_weights(self.model)
        self.allocation.allot(dict.fromkeys(weights, 0.0), weights)  # raises now what would stop the run at stage 2
        self.reconstruction = Reconstruction(reconstruction_iterations, fisher=fisher)
        self.lambdas = {"st": lambda_st, "stae": lambda_stae, "ae": lambda_ae, "penalty": 1.0}
        self.schedule = Schedule(train_steps, finetune_steps)
        self._outcome = Outcome({}, {}, [], {}, {})
        self._stages: dict[str, dict[str, Any]] = {}
        # While the student's last layer is solved: the layer as it was trained, and how its input has been scaled.
        self._trained_layer: dict[str, torch.Tensor] = {}
        self._steps: list[torch.Tensor] = []
        self.seen: Ranges = {}  # properties of the training images
        self._penalty: PenaltyImages | None = None
        self._teacher_features = FeatureCache(self.model.teacher_features)
        self._batches = 0
        self._pace_start = 0.0
        # Everything random in a run follows from this number; -1 until the run has begun.
        self.register_buffer("run_seed", torch.tensor(-1))

    # ---------------------------------------------------------------------------------------------- before training

    def setup(self, stage: str) -> None:
        """Check the settings and the data, and load the teacher, before training starts."""
        if type(self.trainer.strategy.checkpoint_io) is AnomalibCheckpointIO:  # the user's own stays
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage != "fit":
            return
        if self.trainer.datamodule is None:
            msg = "Raad splits its training images itself: pass a datamodule to fit, not dataloaders"
            raise ValueError(msg)
        number = len(self.trainer.datamodule.train_data)
        if number < 2:
            msg = f"the training set has {number} image(s); Raad needs one to train on and one to hold out, better 20"
            raise ValueError(msg)
        warn_of_slow_precision(self.trainer)
        self._check_images()
        self._check_pre_processor()
        if self.hparams["penalty_dir"] is not None:
            self._penalty = PenaltyImages(self.hparams["penalty_dir"])
        if not self.model.teacher_loaded:
            load_teacher_(self.model.teacher, self.hparams["teacher"], self.hparams["model_size"])
            self.model.teacher_loaded.fill_(value=True)

    def _check_images(self) -> None:
        """A broken image would end the fit in the middle, the validation's even after the last step."""
        datasets = [self.trainer.datamodule.train_data, getattr(self.trainer.datamodule, "val_data", None)]
        paths = [path for dataset in datasets if dataset is not None for path in dataset.samples.image_path]
        if faults := unreadable(tqdm(paths, "Checking the images", leave=False)):
            msg = f"{len(faults)} image(s) for training or validation cannot be used:\n{describe(faults)}"
            raise ValueError(msg)

    def _check_pre_processor(self) -> None:
        if self.pre_processor and extract_transforms_by_type(self.pre_processor.transform, Normalize):
            msg = "the pre-processor has a Normalize; Raad normalises in its networks and needs images in [0, 1]"
            raise ValueError(msg)
        if self.input_size and not all(MIN_IMAGE_SIZE <= side <= MAX_IMAGE_SIZE for side in self.input_size):
            msg = (
                f"the image size is {tuple(self.input_size)}; sides of {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} are needed"
            )
            raise ValueError(msg)

    def on_fit_start(self) -> None:
        """Fix the run's seed and with it the split and the order of the training images."""
        if self.run_seed < 0:
            self.run_seed.fill_(self.trainer.strategy.broadcast(torch.initial_seed() % 2**31))
        self._images = NormalImages(self.trainer.datamodule, self.hparams["held_out"], int(self.run_seed))
        self._images.take_over_training(
            lambda: self.trainer.global_step * self.trainer.accumulate_grad_batches,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

    def on_train_start(self) -> None:
        """Lay out the schedule and compute the teacher's channel statistics, once a run."""
        options = self.hparams
        total = int(min(self.trainer.estimated_stepping_batches, np.iinfo(np.int64).max))
        if self.trainer.max_steps == -1 and self.trainer.max_epochs in _UNLIMITED_EPOCHS:
            total = min(total, options["train_steps"] + options["finetune_steps"])
        self.schedule = Schedule.scaled(options["train_steps"], options["finetune_steps"], total)
        if "quantized" in self._stages:  # all that is left is fine-tuning, also of a run that is given more steps now
            step = self._stages["quantized"]["step"]
            self.schedule = Schedule(step, total - step)
        if not self.model.teacher_normalized:  # a fresh run, not a resumed one
            self._once(self._prepare_model)
        # The only use of validation is to set the thresholds of the finished model: it runs once, at the end.
        self._limit_val_batches, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0

    def _prepare_model(self) -> None:
        self.seen = ranges(image[0] for image in self._images.plain(self._calibration_indices))
        with self._evaluating():
            self._set_teacher_statistics()
            if self.hparams["closed_form"]:
                steps = min(AUTOENCODER_STEPS, self.schedule.train_steps)
                train_autoencoder_(self.model, *self._calibration_features(), int(self.run_seed), steps)

    def _set_teacher_statistics(self) -> None:
        images, features = self._calibration_features()
        self.model.set_teacher_statistics_(tqdm(features, "Teacher statistics", total=len(images), leave=False))

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # one of the many forms Lightning takes
        """Adam on student and autoencoder, with a learning rate for each stage."""
        options = self.hparams
        parameters = [*self.model.student.parameters(), *self.model.ae.parameters()]
        steps = [*learned_steps(self.model.student), *learned_steps(self.model.ae)]
        # In the optimizer in any case: a checkpoint then continues with either setting.
        self._steps = [step.requires_grad_() for step in steps] if options["learn_steps"] else []
        optimizer = torch.optim.Adam(
            [
                {"name": "weights", "params": parameters, "weight_decay": options["weight_decay"]},
                {"name": "steps", "params": steps},
            ],
            lr=options["lr"],
        )

        def factor(step: int) -> float:
            stage_factor = (
                options["finetune_lr"] / options["lr"] if self.schedule.stage(step) is Stage.FINE_TUNE else 1.0
            )
            return stage_factor * (0.1 if self.schedule.progress(step) >= 1 - options["lr_decay"] else 1.0)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Quantize when the first step of stage 3 is due."""
        del batch, batch_idx
        if self.schedule.stage(self.global_step) is Stage.FINE_TUNE and "quantized" not in self._stages:
            self._end_stage("trained", self.global_step)
            self._once(self._quantize)
            self.trainer.optimizers[0].state.clear()  # stage 3 starts with a fresh Adam
            self._end_stage("quantized", self.global_step)
            self._teacher_features.clear()  # its poolings read 8 bits here, floats while stage 3 trains
        self._take_up_training()
        if self.hparams["finetune_float"] and self.model.quantized:
            dequantize_(self.model)

    @torch.no_grad()
    def _take_up_training(self) -> None:
        """Go on from the student's trained last layer: with the solution's large weights small steps move far."""
        if self._trained_layer:
            if (scale := self._trained_layer.get("input_scale")) is not None:
                scale_last_input_(self.model.student, 1 / scale.to(self.device))
            layer = last_layer(self.model.student)
            layer.load_state_dict(self._trained_layer, strict=False)
            layer.set_weight_(layer.weight)  # with steps of their own
            self._trained_layer = {}

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss of Eq. 6 and log its terms."""
        images = cast("torch.Tensor", batch.image)
        # With random augmentations an image is never the same twice. The dataset's own also hold our Resize.
        fixed = self.trainer.datamodule.train_augmentations is None
        features = self._teacher_features(batch.image_path, images) if fixed else None
        with self._step_randomness(batch_idx):
            losses = self.model(images, self._penalty.draw(images) if self._penalty else None, features)
        terms = {name: term for name, term in losses._asdict().items() if term is not None}
        loss = sum(self.lambdas[name] * term for name, term in terms.items())
        stage = self.schedule.stage(self.global_step)
        if not torch.isfinite(loss):
            self._stop_at_non_finite("loss", ", ".join(f"{name}={term.item()}" for name, term in terms.items()))
        self.log("stage", float(stage), prog_bar=True)
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({f"train_{name}": term for name, term in terms.items()})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite can spoil the weights."""
        for step in self._steps:
            if step.grad is not None:  # DDP averages the gradients of parameters only
                step.grad = self.trainer.strategy.reduce(step.grad, reduce_op="mean")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._stop_at_non_finite("gradient", f"norm={float(norm)}")

    def _stop_at_non_finite(self, what: str, details: str) -> None:
        stage = self.schedule.stage(self.global_step).name.lower()
        msg = (
            f"the {what} of step {self.global_step} (stage {stage}) is not finite: {details}. The weights are those of "
            "the last good step. Lower lr, finetune_lr or the lambdas."
        )
        raise FloatingPointError(msg)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, and finish the model in the last step, before any callback can save a checkpoint of it."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for step in self._steps:
                step.clamp_(min=torch.finfo(step.dtype).tiny)
        if self.global_step + 1 == self.schedule.total:
            self._teacher_features.clear()  # its poolings read floats while stage 3 trains, 8 bits from now on
            self._end_stage("fine_tuned", self.global_step + 1)
            if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
                folder = Path(self.trainer.default_root_dir)
                picture = write_report(folder, self.model, self._outcome, list(self._stages.values()))
                log_figures(self.loggers, [picture], self.global_step + 1)
            self.trainer.limit_val_batches = self._limit_val_batches
            self.trainer.should_stop = True  # lets Lightning validate even in the middle of an epoch

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """Tell once how long the run will take."""
        del outputs, batch, batch_idx
        first, last = _PACE_STEPS
        self._batches += 1
        if self._batches == first:
            self._pace_start = time.monotonic()
        elif self._batches == last:
            self._forecast((time.monotonic() - self._pace_start) / (last - first))

    def _forecast(self, seconds: float) -> None:
        steps = self.schedule.total - self.global_step
        hours, minutes = divmod(round(steps * seconds / 60), 60)
        logger.info(
            "Raad: %d steps at %.2f s take about %d h %02d min on this machine (train %d, quantize, fine-tune %d). "
            "To shorten: --trainer.max_steps, --trainer.precision bf16-mixed.",
            *(steps, seconds, hours, minutes, self.schedule.train_steps, self.schedule.finetune_steps),
        )

    def on_train_end(self) -> None:
        """Warn if the run ended before the model was finished."""
        self.trainer.limit_val_batches = self._limit_val_batches
        if self.global_step < self.schedule.total:
            logger.warning(
                "Raad stopped after %d of %d steps: the model is not finished. Resume with ckpt_path.",
                *(self.global_step, self.schedule.total),
            )

    def teardown(self, stage: str) -> None:
        """Give the datamodule its own training loader back."""
        if stage == "fit":
            self._teacher_features.clear()
            while self._steps:
                self._steps.pop().requires_grad_(False)  # noqa: FBT003
            self._images.release()
            del self._images  # it refers to the datamodule, which must not be pickled with the model

    # ----------------------------------------------------------------------------------------------------- stage 2

    def solve_student(self) -> None:
        """Solve the student's last layer for the features as they are now, during a fit."""
        with self._evaluating():
            images, features = self._calibration_features()
            layer = last_layer(self.model.student)
            if layer.input_bits:
                self._trained_layer["input_step"] = layer.input_step.detach().clone()
                scale = equalize_last_input_(self.model.student, images[:_EQUALIZED_IMAGES])
                self._trained_layer["input_scale"] = scale
            solve_student_(self.model, images, features, int(self.run_seed))

    def _quantize(self) -> None:
        with self._evaluating():
            self._outcome = quantize_(
                self.model,
                self._plain_images(self._images.held_out, "Hierarchical quantization scoring"),
                self._plain_images(self._calibration_indices, "Quantizer calibration"),
                self.allocation,
                self.reconstruction,
                int(self.run_seed),
            )
            self._teacher_features.clear()
            self._set_teacher_statistics()
        bits = {name: layer.bits for name, layer in quantizable_layers(self.model.teacher).items()}
        logger.info("Raad: bits of teacher and student %s, scores %s", bits, self._outcome.scores)

    def _end_stage(self, name: str, step: int) -> None:
        """Solve the student's last layer, normalise the maps, note how they do on held-out normals, save the model."""
        if self.hparams["closed_form"]:
            if not self._trained_layer:
                parameters = last_layer(self.model.student).named_parameters()
                self._trained_layer = {parameter: value.detach().clone() for parameter, value in parameters}
            self._once(self.solve_student)
        means = self.normalize_maps()
        self._stages[name] = {"stage": name, "step": step, "bytes": model_bytes(self.model), **means}
        for metrics_logger in self.loggers:
            metrics_logger.log_metrics(means, step=step)
        callback = self.trainer.checkpoint_callback
        if name != "fine_tuned" and callback is not None and callback.dirpath and not self.trainer.fast_dev_run:
            self.trainer.save_checkpoint(Path(callback.dirpath) / f"{name}.ckpt")

    def normalize_maps(self) -> dict[str, float]:
        """Set the map quantiles of the model as it is now, during a fit.

        Returns:
            The mean of either unnormalised map on the held-out normal images, and its attention bias where there are
            two or more images of one size.
        """
        images, maps = [], []
        with self._evaluating():
            for image in self._plain_images(self._images.held_out, "Map quantiles"):
                images.append(image)
                maps.append(torch.stack(self.model.maps(image)))
        values = np.concatenate([pair.flatten(1).float().cpu().numpy() for pair in maps], axis=1)
        if self.hparams["normalize_maps"]:
            low, high = np.quantile(values, [0.9, 0.995], axis=1)
            high = np.maximum(high, low + 1e-6)  # the maps of a part without any variation are constant
            self.model.map_quantiles.copy_(torch.tensor(np.stack([low, high], axis=1)))
        figures = dict(zip(["held_out_map_st", "held_out_map_ae"], values.mean(axis=1).tolist(), strict=True))
        if len(images) > 1 and len({image.shape for image in images}) == 1:
            inside = slice(self.model.blind_edge, -self.model.blind_edge or None)
            (st, ae), seen = torch.cat(maps, dim=1)[..., inside, inside], torch.cat(images)[..., inside, inside]
            figures |= {"attention_bias_st": attention_bias(seen, st), "attention_bias_ae": attention_bias(seen, ae)}
        return figures

    # ----------------------------------------------------------------------------------------------------- helpers

    def _once(self, change: Callable[[], None]) -> None:
        """Let one process change the model and give all others the result."""
        if self.trainer.is_global_zero:
            change()
        if self.trainer.world_size > 1:
            result = self.model.state_dict(), self._outcome, self._trained_layer
            state, self._outcome, self._trained_layer = self.trainer.strategy.broadcast(result)
            self.model.load_state_dict(state)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode in the trainer's precision, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                yield
        finally:
            self.model.train(training)

    @contextmanager
    def _step_randomness(self, batch_idx: int) -> Iterator[None]:
        """Draw a step's random numbers from the seed and the step alone, so that a resumed run draws the same."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # A run resumed from the checkpoint of an epoch's end counts its first batches on from that epoch.
            turn = batch_idx % self.trainer.accumulate_grad_batches
            numbers = [int(self.run_seed), self.global_step, turn, self.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
            yield

    @property
    def _calibration_indices(self) -> list[int]:
        return self._images.kept[: self.hparams["calibration_images"]]

    def _calibration_features(self) -> tuple[list[torch.Tensor], Iterator[torch.Tensor]]:
        """The calibration images and their teacher features, of which those not known are computed one by one."""
        images = list(self._plain_images(self._calibration_indices, "Reading the calibration images"))
        paths = self._images.paths(self._calibration_indices)
        return images, (self._teacher_features([path], image) for path, image in zip(paths, images, strict=True))

    def _plain_images(self, indices: Sequence[int], description: str) -> Iterator[torch.Tensor]:
        transform = cast("PreProcessor", self.pre_processor).transform if self.pre_processor else None
        bar = tqdm(self._images.plain(indices), description, total=len(indices), leave=False)
        for image in bar:
            yield transform(image.to(self.device)) if transform else image.to(self.device)

    # ---------------------------------------------------------------------------------------------- anomalib's hooks

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
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
        return [PredictionGuard(), *cast("list[Callback]", super().configure_callbacks())]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the report's numbers with the model.

        Raises:
            FloatingPointError: If a weight is not finite; a checkpoint of it would be of no use.
        """
        super().on_save_checkpoint(checkpoint)
        state = self.model.named_parameters(prefix="model")
        if broken := [name for name, value in state if not value.isfinite().all()]:
            names = ", ".join(broken)
            msg = f"no checkpoint: the values of {names} are not finite. Lower lr, finetune_lr or weight_decay."
            raise FloatingPointError(msg)
        checkpoint["raad"] = {
            "format": _FORMAT,
            "outcome": self._outcome.state(),
            "stages": self._stages,
            "seen": self.seen,
            "trained_layer": self._trained_layer,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the report's numbers."""
        super().on_load_checkpoint(checkpoint)
        if "raad" not in checkpoint:
            msg = "this is not a checkpoint of Raad; it holds a model of another class"
            raise ValueError(msg)
        if checkpoint["raad"].get("format", _FORMAT) > _FORMAT:
            msg = f"the checkpoint's format is {checkpoint['raad']['format']}, known are those up to {_FORMAT}; "
            msg += "install the anomalib-raad that wrote it, or a newer one"
            raise ValueError(msg)
        self._outcome = Outcome.from_state(checkpoint["raad"]["outcome"])
        self._stages = checkpoint["raad"]["stages"]
        self._trained_layer = checkpoint["raad"].get("trained_layer", {})
        self.seen = checkpoint["raad"].get("seen", {})
        # Settings of metrics are no part of the model: it can be tested with others than it was trained with.
        metrics = {name: value for name, value in self.state_dict().items() if name.startswith("evaluator.")}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("evaluator.")} | metrics

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "Raad":  # noqa: ANN401
        """Check a checkpoint and load it, see anomalib's method.

        Raises:
            ValueError: If the file is damaged, holds another model, or was written by a newer version.
        """
        check_archive(checkpoint_path)
        return cast("Raad", super().load_from_checkpoint(checkpoint_path, *args, **kwargs))

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        *args: Any,  # noqa: ANN401
        packed: bool = True,
        feature_projection: int | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to OpenVINO IR; a finished model's convolutions then run in integer kernels.

        For exactly the checkpoint's scores compile it with ``{"INFERENCE_PRECISION_HINT": "f32"}``
        (``OpenVINOInferencer(config=...)``): by default OpenVINO computes what lies between the convolutions in
        bfloat16 on CPUs that have it.

        Args:
            export_root: The IR goes into ``weights/openvino`` in this folder.
            model_file_name: Name of the files.
            input_size: Height and width of the images; ``None``: any.
            compression_type: ``None``, or ``FP16`` for biases and steps in float16. With the others, and with options
                for anomalib's conversion (``args``, ``ov_kwargs``, ``onnx_kwargs``), anomalib exports the simulation of
                the quantized model, which computes in floating point.
            args: The other arguments of anomalib's method.
            packed: Store weights of 2 bits in 2 and those of 3 or 4 bits in 4 bits. The results are the same.
            feature_projection: Compare only so many random directions of the 384 channels: smaller and faster, and the
                scores differ a little from the checkpoint's. For finished models.
            kwargs: Like ``args``.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If there are fewer channels than ``feature_projection``.
            ModuleNotFoundError: If OpenVINO is not installed.
        """
        plain = args or kwargs.get("ov_kwargs") or kwargs.get("onnx_kwargs")
        if not self.model.quantized or plain or compression_type not in {None, CompressionType.FP16}:
            state = "quantized already; this exports its simulation" if self.model.quantized else "not quantized yet"
            logger.warning("Raad: the model is %s. The IR will not run all convolutions in integers.", state)
            return super().to_openvino(export_root, model_file_name, input_size, compression_type, *args, **kwargs)
        if not module_available("openvino"):
            msg = "exporting to OpenVINO needs OpenVINO: pip install 'anomalib[openvino]'"
            raise ModuleNotFoundError(msg)
        from .export.openvino import save_integer_ir  # noqa: PLC0415  # an optional part of anomalib

        path = create_export_root(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
        trained = self.model
        if feature_projection is not None:
            self.model = deepcopy(trained)
            project_(self.model, feature_projection)
        try:
            save_integer_ir(self, path, input_size, packed=packed, half=compression_type == CompressionType.FP16)
        finally:
            self.model = trained
        return path

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to 256x256 by default; ImageNet normalisation is part of the networks."""
        # Not in a Compose: anomalib's tiled ensemble takes the Resize out, and a Compose must not be empty.
        return RaadPreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """anomalib's, with scores that are not cut off."""
        return RaadPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> StageVisualizer:
        """Heatmaps as anomalib draws them, and the figures of the stages."""
        return StageVisualizer()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training there is nothing to validate. And Raad shares out the batches itself."""
        return {"num_sanity_val_steps": 0, "use_distributed_sampler": False}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images only."""
        return LearningType.ONE_CLASS
