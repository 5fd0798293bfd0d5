"""RAAD as an anomalib model: the hooks that carry a fit through its three stages."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch, ImageBatch
from anomalib.deploy import CompressionType, ExportType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.components.base.export_mixin.utils import create_export_root
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Resize

from anomalib_raad.data.drift import ranges
from anomalib_raad.data.penalty import PenaltyImages
from anomalib_raad.export.installed import check_installed
from anomalib_raad.fit.checks import check_numbers
from anomalib_raad.fit.feature_cache import FeatureCache
from anomalib_raad.fit.staged_model import StagedModel
from anomalib_raad.fit.time_budget import StepClock, TimeBudget
from anomalib_raad.fit.trainer import forget_best, images_a_step, is_dev_run, validation_images
from anomalib_raad.post_processing import check_thresholds
from anomalib_raad.pre_processing import RaadPreProcessor
from anomalib_raad.progress import progress
from anomalib_raad.quantization.allocation import DEFAULT_AVERAGE_BITS, Allocation
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.quantization.recipe import aligned_weights, quantize_
from anomalib_raad.quantization.reconstruction import Reconstruction
from anomalib_raad.quantization.size import model_bytes
from anomalib_raad.report.attention_bias import held_out_figures
from anomalib_raad.report.quantization import write_report
from anomalib_raad.report.stages import FigureVisualizer, draw_complete, log_figures
from anomalib_raad.teacher.pdn import CHANNELS
from anomalib_raad.teacher.weights import load_teacher_

from .autoencoder_start import AUTOENCODER_STEPS, train_autoencoder_
from .losses import Losses
from .networks import PatchDescriptionNetwork
from .plan import Pacer, Plan, measure_pace, plan
from .record import RaadRecord
from .schedule import STAGE_CHECKPOINTS, LearningRates, Schedule, Stage
from .student_head import SAMPLES
from .torch_model import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, RaadModel

logger = logging.getLogger(__name__)

_NEEDS = {
    "a positive number up to 1": ("lr", "finetune_lr"),
    "zero or a positive number": ("weight_decay",),
    "a whole number from 1": ("train_steps", "finetune_steps", "calibration_images", "channels"),
    "a whole number from 0": ("reconstruction_iterations",),
    "a share between 0 and 1": ("held_out",),
    "a share from 0 to 1": ("lr_decay",),
    "a quantile in [0, 1)": ("p_hard",),
}
_FINISHED = "the model is quantized already, and exported without compression_type it runs in integers as it is. "
_ANOMALIBS_EXPORT = {  # by whether the model is quantized and whether anomalib is to quantize it
    (False, False): "the model is not quantized yet: the IR will not run all convolutions in integers.",
    (False, True): "the model is not quantized yet: anomalib quantizes it, without stages 2 and 3.",
    (True, False): _FINISHED + "This exports its simulation, which computes in floating point.",
    (True, True): _FINISHED + "Quantizing it once more changes scores and verdicts: measure before you use it.",
}
_LAMBDAS = {"zero or a positive number": ("lambdas[0]", "lambdas[1]", "lambdas[2]")}


class Raad(StagedModel, AnomalibModule):
    """RAAD: recalibrating the attention of industrial anomaly detection by quantization.

    One ``fit`` trains EfficientAD's student and autoencoder on normal images, quantizes teacher, student and
    autoencoder with bits chosen by hierarchical quantization scoring, and fine-tunes through the quantizers. The last
    checkpoint holds the finished model.

    Paper: https://arxiv.org/abs/2412.08189

    Args:
        teacher: ``bundled``, ``efficientad`` (anomalib's official weights, downloaded) or the path of a weights file.
        model_size: ``small`` or ``medium``.
        padding: Zero-pad the convolutions of teacher and student.
        channels: Compare so many random directions of the teacher's 384 channels; 384 compares the channels (paper).
        lr: Learning rate of stage 1 (EfficientAD's; paper of RAAD: 1e-5).
        lr_decay: The last share of either stage runs at a tenth of its learning rate (EfficientAD: 0.05); 0 for
            constant rates.
        finetune_lr: Learning rate of stage 3 (paper: 1e-5, for 60,000 steps).
        weight_decay: Adam's weight decay.
        train_steps: Optimizer steps of stage 1, when the trainer's limits allow and ask for no other length; otherwise
            the stages share the trainer's steps in this proportion.
        finetune_steps: Optimizer steps of stage 3, likewise.
        p_hard: Quantile of the hard-feature selection in Eq. 5.
        lambdas: Weights of L_ts, L_aes and L_tae in Eq. 6.
        penalty_dir: Folder with images of anything but the part, for EfficientAD's penalty. ``None``: no penalty.
        recalibrate: Divide the two maps by what normal training images show at the same place.
        normalize_maps: Normalise the two maps by their quantiles on held-out normal images, and weigh them by what
            student and autoencoder explain of the teacher there. ``False``: their plain mean.
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

    logged = ("train_loss", *(f"train_{name}" for name in Losses._fields))
    STEADIER = "lr, finetune_lr or the lambdas"
    SIZES = MIN_IMAGE_SIZE, MAX_IMAGE_SIZE

    model: RaadModel
    record: RaadRecord
    schedule: Schedule

    def __init__(
        self,
        teacher: str | Path = "bundled",
        model_size: str = "small",
        padding: bool = False,
        channels: int = 128,
        lr: float = 1e-4,
        lr_decay: float = 0.2,
        finetune_lr: float = 1e-4,
        weight_decay: float = 1e-5,
        train_steps: int = 70_000,
        finetune_steps: int = 60_000,
        p_hard: float = 0.999,
        lambdas: tuple[float, float, float] = (1.0, 1.0, 1.0),
        penalty_dir: str | Path | None = None,
        recalibrate: bool = True,
        normalize_maps: bool = True,
        bits: int | dict[str, int] | None = None,
        average_bits: float = DEFAULT_AVERAGE_BITS,
        activation_bits: int | None = 8,
        first_last_bits: int = 8,
        autoencoder_bits: int = 8,
        hqs_thresholds: tuple[float, float, float] | None = None,
        reconstruction_iterations: int = 300,
        closed_form: bool = True,
        held_out: float = 0.1,
        calibration_images: int = 128,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.begin_run()
        check_numbers(self.hparams, _NEEDS)
        check_numbers({f"lambdas[{i}]": value for i, value in enumerate(lambdas)}, _LAMBDAS)
        if channels > CHANNELS:
            msg = f"channels is {channels}; a teacher has {CHANNELS}"
            raise ValueError(msg)
        self.model = RaadModel(model_size, padding, channels, p_hard)
        self.allocation = Allocation(
            bits, first_last_bits, autoencoder_bits, hqs_thresholds, average_bits, activation_bits
        )
        weights = aligned_weights(self.model)
        self.allocation.allot(dict.fromkeys(weights, 0.0), weights)  # raises now what would stop the run at stage 2
        self.reconstruction = Reconstruction(reconstruction_iterations)
        self.full_schedule = self.schedule = Schedule(train_steps, finetune_steps)  # without limits; of the run
        self.learning_rates = LearningRates(lr, finetune_lr, lr_decay)
        self.weight_decay = weight_decay
        self.lambdas = lambdas
        self.recalibrate = recalibrate
        self.normalize_maps = normalize_maps
        self.closed_form = closed_form
        self.held_out = held_out
        self.calibration_images = calibration_images
        self.teacher_source, self.model_size, self.padding, self.penalty_dir = teacher, model_size, padding, penalty_dir
        self._penalty: PenaltyImages | None = None
        self._pacer: Pacer | None = None
        self._teacher_features = FeatureCache(self._teacher_maps)

    # ---------------------------------------------------------------------------------------------- before training

    @classmethod
    def new_record(cls) -> RaadRecord:
        """An empty record."""
        return RaadRecord()

    def setup(self, stage: str) -> None:
        """Check the settings and the data before training starts."""
        super().setup(stage)
        if stage == "fit" and self.penalty_dir is not None:
            self._penalty = PenaltyImages(self.penalty_dir)

    def begin_anew(self) -> None:
        """A fit without checkpoint is a run of its own, from the weights that student and autoencoder have."""
        super().begin_anew()
        self.model.begin_anew_()

    def on_train_start(self) -> None:
        """Lay out the schedule and compute the teacher's channel statistics, once a run."""
        self.lay_out(self.full_schedule, self.record.step(Stage.QUANTIZED) if self._quantized else None)
        self._pacer = None
        if self._budget and not self.record.steps:  # a resumed run keeps its plan
            self._plan(self._budget)
        if self.record.plan:
            self._images.use_at_most(self.record.plan.held_out_images, self.record.plan.calibration_images)
        if not self.model.teacher_normalized:  # a fresh run, not a resumed one
            self.once(self._prepare_model)

    @property
    def _quantized(self) -> bool:
        return self.record.reached(Stage.QUANTIZED)

    def _plan(self, budget: TimeBudget) -> None:
        """Measure the pace and plan the work beside the steps; all processes take the first one's plan."""
        with self.evaluating():
            image = next(self._images.prepared(self._images.calibration[:1], "Measuring the pace"))
            pace = measure_pace(self.model, image, solves=self.closed_form)
        validated = validation_images(self.trainer)
        self._pacer = Pacer(budget, pace, validated, self.full_schedule, self.schedule.total, self.global_step)
        held_out, calibration = len(self._images.held_out), len(self._images.calibration)
        usual = Plan(calibration, held_out, SAMPLES, self.reconstruction.iterations, budget.seconds)
        images = min(images_a_step(self.trainer), len(self._images.kept))
        planned = plan(budget.remaining, pace, usual, validated, images)
        self.record.plan = self.trainer.strategy.broadcast(planned)

    def _prepare_model(self) -> None:
        if not self.model.teacher_loaded:
            self._load_teacher()
        self.record.seen = ranges(image[0] for image in self._images.plain(self._images.calibration))
        with self.evaluating():
            self._set_teacher_statistics()
            if self.closed_form:
                steps = min(AUTOENCODER_STEPS, self.schedule.first)
                seconds = self.record.plan.autoencoder_seconds if self.record.plan else math.inf
                train_autoencoder_(self.model, *self._calibration(), int(self.run_seed), steps, seconds=seconds)

    def _load_teacher(self) -> None:
        teacher = PatchDescriptionNetwork(self.model_size, CHANNELS, self.padding).eval()
        load_teacher_(teacher, self.teacher_source, self.model_size)
        images = self._images.prepared(self._images.calibration, "Statistics of the teacher's own channels")
        with self.evaluating():
            self.model.set_teacher_(teacher.to(self.device), images)

    def _set_teacher_statistics(self) -> None:
        images, features = self._calibration()
        self.model.set_teacher_statistics_(progress(features, "Teacher statistics", len(images)))

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # one of the many forms Lightning takes
        """Adam on student and autoencoder, with a learning rate for each stage."""
        rates = self.learning_rates
        parameters = [*self.model.student.parameters(), *self.model.ae.parameters()]
        optimizer = torch.optim.Adam(parameters, rates.lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates.factor(self.schedule, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Quantize when the first step of stage 3 is due, or a callback has stopped stage 1."""
        del batch, batch_idx
        self.stop_if_asked(self._quantized)
        if self.schedule.begun(self.global_step) and not self._quantized:
            self._end_stage(Stage.TRAINED, self.global_step)
            self.once(self._quantize)
            self.trainer.optimizers[0].state.clear()  # stage 3 starts with a fresh Adam
            forget_best(self.trainer)
            self._end_stage(Stage.QUANTIZED, self.global_step)
            self._teacher_features.clear()  # its poolings read 8 bits here, floats while stage 3 trains
            if self._pacer:
                if self._pacer.clock.found:
                    self._lay_out()
                self._pacer.clock = StepClock(self.global_step)
        self.model.student_head.restore_(self.model.student)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss of Eq. 6 and log its terms."""
        images = cast("torch.Tensor", batch.image)
        paths = None if self._images.vary else batch.image_path
        features = None if paths is None else self._teacher_features(paths, images)[0]
        with self.step_randomness(batch_idx):
            losses: Losses = self.model(images, self._penalty.draw(images) if self._penalty else None, features)
        loss = losses.weighted(self.lambdas)
        self.log_losses(loss, losses._asdict(), self.schedule.stage(self.global_step).number)
        return loss

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """Lay out the steps that the time allows when their pace is known, in stage 1 and once more in stage 3."""
        del outputs, batch, batch_idx
        finished = self.global_step >= self.schedule.total  # the trainer stops, whatever time is left
        if self._pacer and not finished and self._pacer.clock.tick(self.global_step):
            self._lay_out()

    def held_out_loss(self, image: torch.Tensor) -> torch.Tensor:
        """The loss of Eq. 6 for a held-out normal image ``(1, 3, H, W)``."""
        return self.model.losses(image).weighted(self.lambdas)

    def _lay_out(self) -> None:
        """Choose the schedule that fits the time that is left; all processes take the first one's."""
        pacer, planned = cast("Pacer", self._pacer), cast("Plan", self.record.plan)
        schedule = pacer.schedule(planned, self.schedule, self.global_step, self._quantized)
        self.follow(self.trainer.strategy.broadcast(schedule))
        images = images_a_step(self.trainer)
        logger.info("Raad: what the time allows, in steps of %d image(s): %s.", images, self.schedule)

    def finish(self) -> None:
        """End stage 3 and report."""
        self._teacher_features.clear()  # its poolings read floats while stage 3 trains, 8 bits from now on
        self._end_stage(Stage.FINE_TUNED, self.global_step + 1)
        if self.trainer.is_global_zero and not is_dev_run(self.trainer):
            stages = list(self.record.stages.values())
            picture = write_report(self.results, self.model, self.record.outcome, stages)
            log_figures(self.loggers, [picture], self.global_step + 1)

    def teardown(self, stage: str) -> None:
        """Give the datamodule its own training loader back, and forget the teacher's features."""
        super().teardown(stage)
        if stage == "fit":
            self._teacher_features.clear()

    # -------------------------------------------------------------------------------------------- the ends of stages

    def _quantize(self) -> None:
        reconstruction = self.reconstruction
        if self.record.plan:
            reconstruction = replace(reconstruction, iterations=self.record.plan.iterations)
        with self.evaluating():
            self.record.outcome = quantize_(
                self.model,
                self._images.prepared(self._images.held_out, "Hierarchical quantization scoring"),
                self._images.prepared(self._images.calibration, "Quantizer calibration"),
                self.allocation,
                reconstruction,
                int(self.run_seed),
            )
            self._teacher_features.clear()
            self._set_teacher_statistics()
        bits = {name: layer.bits for name, layer in quantizable_layers(self.model.teacher).items()}
        logger.info("Raad: bits of teacher and student %s, scores %s", bits, self.record.outcome.scores)

    def _end_stage(self, stage: Stage, step: int) -> None:
        """Solve the student's last layer, normalise the maps, note how they do on held-out normals, save the model."""
        start = time.monotonic()
        if self.closed_form:
            self.once(self.solve_student)
        figures = self.look_at_held_out()
        if self._pacer:
            self._pacer.end_seconds = time.monotonic() - start
        self.end_stage(stage.value, step, {"bytes": model_bytes(self.model)}, figures)

    def solve_student(self) -> None:
        """Solve the student's last layer for the features as they are now, during a fit."""
        with self.evaluating():
            samples = self.record.plan.samples if self.record.plan else SAMPLES
            self.model.solve_student_(*self._calibration(), int(self.run_seed), samples)

    def look_at_held_out(self) -> dict[str, float]:
        """Recalibrate, normalise and weigh the maps of the model as it is now, during a fit.

        Returns:
            What their maps say, see :func:`~.attention_bias.held_out_figures`, and what student and autoencoder explain
            of the teacher.
        """
        model, images = self.model, list(self._images.prepared(self._images.held_out, "Reading the held-out images"))
        with self.evaluating():
            if self.recalibrate:
                calibration = self._images.prepared(self._images.calibration, "Bias of the maps")
                model.recalibration.fit_([model.maps(image) for image in calibration])
            maps = [model.maps(image) for image in progress(images, "Map quantiles")]
            recalibrated = [model.recalibration(both) for both in maps]
            explained = torch.stack([model.explained_variance(image) for image in images]).mean(0)
        if self.normalize_maps:
            model.set_map_quantiles_(recalibrated)
            model.weigh_maps_(explained)
        shares = {f"explained_{name}": float(share) for name, share in zip(("st", "ae"), explained, strict=True)}
        return held_out_figures(images, maps, recalibrated) | shares

    def _teacher_maps(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.model.teacher(image)]

    def _calibration(self) -> tuple[list[torch.Tensor], Iterator[torch.Tensor]]:
        """The calibration images and their teacher features, of which those not known are computed one by one."""
        images = list(self._images.prepared(self._images.calibration, "Reading the calibration images"))
        paths = self._images.paths(self._images.calibration)
        return images, (self._teacher_features([path], image)[0] for path, image in zip(paths, images, strict=True))

    # ------------------------------------------------------------------------------------------------------- anomalib

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        *args: Any,
        packed: bool = True,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO IR; a finished model's convolutions then run in integer kernels.

        For exactly the checkpoint's scores compile it with ``{"INFERENCE_PRECISION_HINT": "f32"}``
        (``OpenVINOInferencer(config=...)``): by default OpenVINO computes what lies between the convolutions in
        bfloat16 on CPUs that have it.

        Args:
            export_root: The IR goes into ``weights/openvino`` in this folder.
            model_file_name: Name of the files.
            input_size: Height and width of the images; ``None``: any.
            compression_type: ``None``, or ``FP16`` for biases and scales in float16. With the others, and with options
                for anomalib's conversion (``args``, ``ov_kwargs``, ``onnx_kwargs``), anomalib exports the simulation of
                the quantized model, which computes in floating point.
            args: The other arguments of anomalib's method.
            packed: Store weights of 2 bits in 2 and those of 3 or 4 bits in 4 bits. The results are the same.
            kwargs: Like ``args``.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If the model is not finished.
            ModuleNotFoundError: If OpenVINO is not installed.
        """
        check_thresholds(self.post_processor)
        plain = args or kwargs.get("ov_kwargs") or kwargs.get("onnx_kwargs")
        compresses = compression_type not in {None, CompressionType.FP16}
        if not self.model.quantized or plain or compresses:
            logger.warning("Raad: %s", _ANOMALIBS_EXPORT[self.model.quantized, compresses])
            return super().to_openvino(export_root, model_file_name, input_size, compression_type, *args, **kwargs)
        check_installed("openvino")
        from anomalib_raad.export.openvino import convert_integer, save_ir  # noqa: PLC0415  # an optional part of anomalib

        path = create_export_root(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
        save_ir(convert_integer(self, input_size, packed), path, half=compression_type == CompressionType.FP16)
        return path

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to 128x128 by default, where a patch is a quarter of the side; the networks normalise themselves."""
        # Not in a Compose: anomalib's tiled ensemble takes the Resize out, and a Compose must not be empty.
        return RaadPreProcessor(transform=Resize(image_size or (128, 128), antialias=True))

    @classmethod
    def configure_visualizer(cls) -> FigureVisualizer:
        """Heatmaps as anomalib draws them, and the figures of the stages."""
        return FigureVisualizer(partial(draw_complete, STAGE_CHECKPOINTS), "stages.png")
