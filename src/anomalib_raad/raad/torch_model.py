"""RAAD's networks and what is computed from them: loss terms, anomaly maps, scores. No Lightning."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.quantization.layers import dequantize_, quantizable_layers, quantizable_poolings
from anomalib_raad.teacher.statistics import channel_mean_std

from .losses import Losses, augment, hard_feature_loss, squared_difference
from .networks import Autoencoder, PatchDescriptionNetwork, channels_last
from .recalibration import Recalibration
from .student_head import SAMPLES, StudentHead

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 64, 1024
_PLAIN_MAPS = [[0.0, 0.1], [0.0, 0.1]]  # quantiles that leave the maps as they are
_EQUAL_WEIGHTS = [0.5, 0.5]


class RaadModel(nn.Module):
    """Teacher, student and autoencoder of EfficientAD with convolutions that can be quantized in place.

    In training mode :meth:`forward` returns :class:`Losses`, in evaluation mode an ``InferenceBatch``.

    Images may have any size from 64 to 1024 pixels a side. The PDNs are fully convolutional. The autoencoder always
    sees the whole image at 256x256, so that its bottleneck stays one vector of 64 values; its output is resized to the
    PDNs' cells. At 256x256 the networks are EfficientAD's, but for the image's extension.

    Args:
        model_size: ``small`` (PDN-S) or ``medium`` (PDN-M).
        padding: Zero-pad the PDNs' convolutions. Without it they see the image extended by reflection.
        out_channels: Channels of teacher and autoencoder; the student has twice as many.
        p_hard: Quantile of the hard-feature selection, see :func:`~.losses.hard_feature_loss`.
    """

    teacher_mean: torch.Tensor
    teacher_std: torch.Tensor
    map_quantiles: torch.Tensor
    map_weights: torch.Tensor
    teacher_loaded: torch.Tensor
    teacher_normalized: torch.Tensor

    def __init__(
        self,
        model_size: str = "small",
        padding: bool = False,
        out_channels: int = 384,
        p_hard: float = 0.999,
    ) -> None:
        super().__init__()
        if not 0 <= p_hard < 1:
            msg = f"p_hard is {p_hard}; a quantile in [0, 1) is needed"
            raise ValueError(msg)
        self.teacher = PatchDescriptionNetwork(model_size, out_channels, padding).requires_grad_(requires_grad=False)
        self.student = PatchDescriptionNetwork(model_size, 2 * out_channels, padding)
        self.ae = Autoencoder(out_channels, padding)
        self.student_head = StudentHead(self.student.head)
        self.recalibration = Recalibration()
        self.out_channels = out_channels
        self.p_hard = p_hard
        # Channel statistics of the teacher on normal images, mu and sigma.
        self.register_buffer("teacher_mean", torch.zeros(1, out_channels, 1, 1))
        self.register_buffer("teacher_std", torch.ones(1, out_channels, 1, 1))
        # Rows: student-teacher map, student-autoencoder map; columns: q_a and q_b.
        self.register_buffer("map_quantiles", torch.tensor(_PLAIN_MAPS))
        self.register_buffer("map_weights", torch.tensor(_EQUAL_WEIGHTS))
        self.register_buffer("teacher_loaded", torch.zeros((), dtype=torch.bool))
        self.register_buffer("teacher_normalized", torch.zeros((), dtype=torch.bool))
        self.train()

    @property
    def quantized(self) -> bool:
        """Whether stage 2 is over."""
        return any(layer.bits for layer in quantizable_layers(self).values())

    def train(self, mode: bool = True) -> "RaadModel":
        """Set the mode of student and autoencoder; the teacher stays in evaluation mode but for its poolings."""
        super().train(mode)
        self.teacher.eval()
        for pooling in quantizable_poolings(self.teacher).values():
            pooling.train(mode)
        return self

    def forward(
        self,
        image: torch.Tensor,
        penalty_image: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> Losses | InferenceBatch:
        """Compute the loss terms (training mode) or predictions (evaluation mode).

        Args:
            image: Images of shape ``(N, 3, H, W)`` in [0, 1], not normalised.
            penalty_image: In training mode, images for the penalty, of the same shape. ``None``: no penalty.
            teacher_features: In training mode, the teacher's features of ``image``, if they are known.

        Raises:
            TypeError: If the image is in float16.
        """
        if image.dtype == torch.float16:
            msg = "the networks' sums exceed float16; use bfloat16, which is as fast, or float32"
            raise TypeError(msg)
        if self.training:
            return self.losses(image, penalty_image, teacher_features)
        low, high = self.map_quantiles.T.unsqueeze(-1).unsqueeze(-1)
        # Weighted mean of EfficientAD's normalised maps: the q_a-quantile of normal images becomes 0, the q_b-quantile
        # 0.1. Taken before the resize, which is linear: one instead of two.
        normalized = 0.1 * (self.recalibration(self.maps(image)) - low) / (high - low)
        cell_map = (normalized * self.map_weights.view(1, 2, 1, 1)).sum(dim=1, keepdim=True)
        anomaly_map = F.interpolate(cell_map, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(-2, -1)), anomaly_map=anomaly_map)

    def losses(
        self,
        image: torch.Tensor,
        penalty_image: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> Losses:
        """The terms of Eq. 6 for a batch of images in [0, 1], shape ``(N, 3, H, W)``; see :meth:`forward`."""
        to_teacher, to_autoencoder = slice(None, self.out_channels), slice(self.out_channels, None)
        image = channels_last(image)
        augmented = channels_last(augment(image))
        with torch.no_grad():
            target = self.normalized_teacher(image, teacher_features)
            augmented_target = self.normalized_teacher(augmented)

        student = self.student(augmented, to_autoencoder)
        autoencoder = self.ae(augmented, student.shape[-2:])
        penalty = None
        if penalty_image is not None:
            penalty = self.student(penalty_image, to_teacher).float().square().mean()
        return Losses(
            st=hard_feature_loss(target, self.student(image, to_teacher), self.p_hard),
            stae=squared_difference(autoencoder, student).mean(),
            ae=squared_difference(augmented_target, autoencoder).mean(),
            penalty=penalty,
        )

    def maps(self, image: torch.Tensor) -> torch.Tensor:
        """Student-teacher and student-autoencoder map, ``M = mean_c D``, of images ``(N, 3, H, W)`` in [0, 1].

        Returns:
            Both maps of each image as they are, not recalibrated: ``(N, 2, h, w)``, a cell for every four pixels. Along
            the edges, where no patch of a PDN has its centre, they say what the nearest patch says, which sees them.
        """
        image = channels_last(image)
        student = self.student(image)
        to_teacher, to_autoencoder = student[:, : self.out_channels], student[:, self.out_channels :]
        map_st = squared_difference(self.normalized_teacher(image), to_teacher).mean(dim=1, keepdim=True)
        map_ae = squared_difference(self.ae(image, student.shape[-2:]), to_autoencoder).mean(dim=1, keepdim=True)
        return F.pad(torch.cat([map_st, map_ae], dim=1), [self.student.unseen] * 4, mode="replicate")

    def explained_variance(self, image: torch.Tensor) -> torch.Tensor:
        """What student and autoencoder explain of the teacher's variance on images ``(N, 3, H, W)`` in [0, 1].

        Returns:
            ``R^2(X) = 1 - mean (T' - X)^2 / mean T'^2`` of either, shape ``(2,)``; ``T'`` is the normalised teacher.
        """
        teacher = self.normalized_teacher(image)
        predictions = self.student(image, slice(None, self.out_channels)), self.ae(image, teacher.shape[-2:])
        errors = torch.stack([squared_difference(teacher, prediction).mean() for prediction in predictions])
        return 1 - errors / teacher.float().square().mean().clamp(min=1e-6)  # parts of one colour have no variance

    def normalized_teacher(self, image: torch.Tensor, teacher_features: torch.Tensor | None = None) -> torch.Tensor:
        """Teacher features with mean 0 and deviation 1 in each channel on normal images, ``(N, C, h, w)``."""
        features = self.teacher(image) if teacher_features is None else teacher_features
        return (features - self.teacher_mean) / self.teacher_std

    def student_target(self, image: torch.Tensor, teacher_features: torch.Tensor | None = None) -> torch.Tensor:
        """What both halves of the student are to predict: normalised teacher and autoencoder, ``(N, 2 C, h, w)``."""
        teacher = self.normalized_teacher(image, teacher_features)
        return torch.cat([teacher, self.ae(image, teacher.shape[-2:])], dim=1)

    def aligned_features(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Features of teacher and student layer by layer, for Eq. 4; each of shape ``(N, c_l, h_l, w_l)``.

        After the ReLU for the inner layers; for the last one the normalised teacher. Where the student is twice as
        wide, its first half counts, the one that learns the teacher.
        """
        teacher, student = [*self.teacher.features(image)], [*self.student.features(image)]
        teacher.append(self.normalized_teacher(image, self.teacher.head(teacher[-1])))
        student.append(self.student.head(student[-1]))
        return [(t, s[:, : t.shape[1]]) for t, s in zip(teacher, student, strict=True)]

    @torch.no_grad()
    def set_teacher_(self, teacher: PatchDescriptionNetwork, images: Iterable[torch.Tensor], seed: int = 0) -> None:
        """Take over a teacher, of whose normalised C channels the model compares k random directions.

            T'(x) = P (T(x) - mu) / sigma,    E[1/k ||P d||^2] = 1/C ||d||^2

        for a matrix P of k orthonormal rows, drawn uniformly: the maps, which know the channels only by the mean of
        their squared differences, keep their meaning. With k = C the channels stay what they are.

        Args:
            teacher: A teacher of C channels.
            images: Normal images for mu and sigma, each ``(1, 3, H, W)`` in [0, 1].
            seed: Seed of the directions; the default lets a student go on to other data.
        """
        for own, given in zip(self.teacher.parameters(), teacher.parameters(), strict=True):
            if own.shape == given.shape:
                own.copy_(given)
        head, channels = teacher.head, teacher.head.out_channels
        if self.out_channels < channels:
            mean, std = (values.flatten() for values in channel_mean_std(map(teacher, images)))
            normal = torch.randn(channels, self.out_channels, generator=torch.Generator().manual_seed(seed))
            directions = torch.linalg.qr(normal)[0].T.to(head.weight) / std
            self.teacher.head.weight.copy_(torch.einsum("kc,cihw->kihw", directions, head.weight))
            self.teacher.head.bias.copy_(directions @ (head.bias - mean))
        self.teacher_loaded.fill_(value=True)

    @torch.no_grad()
    def set_teacher_statistics_(self, teacher_features: Iterable[torch.Tensor]) -> None:
        """Compute the channels' mean and standard deviation of the teacher's features of normal images."""
        mean, std = channel_mean_std(teacher_features)
        self.teacher_mean.copy_(mean)
        self.teacher_std.copy_(std)
        self.teacher_normalized.fill_(value=True)

    @torch.no_grad()
    def begin_anew_(self) -> None:
        """Go back before stage 1 with the weights of student and autoencoder: a run on other data begins with them.

        The teacher and all statistics are to be set again; quantized weights stay as they are, in floating point.
        """
        self.student_head.restore_(self.student)
        dequantize_(self)
        self.teacher_loaded.fill_(value=False)
        self.teacher_normalized.fill_(value=False)
        self.map_quantiles.copy_(torch.tensor(_PLAIN_MAPS))
        self.map_weights.copy_(torch.tensor(_EQUAL_WEIGHTS))
        self.recalibration.reset_()

    @torch.no_grad()
    def set_map_quantiles_(self, maps: Sequence[torch.Tensor]) -> None:
        """Normalise the maps by their 0.9- and 0.995-quantile on normal images, q_a and q_b in EfficientAD.

        Args:
            maps: Of each image both recalibrated maps, ``(1, 2, h, w)``.
        """
        values = np.concatenate([both[0].flatten(1).float().cpu().numpy() for both in maps], axis=1)
        low, high = np.quantile(values, [0.9, 0.995], axis=1)
        # The maps of a part without any variation are constant, and large where nothing has been learned.
        high = np.maximum(high, low + 1e-6 + 1e-3 * np.abs(low))
        self.map_quantiles.copy_(torch.tensor(np.stack([low, high], axis=1)))

    @torch.no_grad()
    def weigh_maps_(self, explained: torch.Tensor) -> None:
        """Let each map count as much as its network explains of the teacher on normal images.

            w_st : w_ae = R^2(S) : R^2(A)

        The map of a network that has learned nothing of the part says the same of a defect as of anything else.

        Args:
            explained: See :meth:`explained_variance`; less than nothing is nothing.
        """
        explained = explained.clamp(min=0)
        equal = self.map_weights.new_tensor(_EQUAL_WEIGHTS)
        self.map_weights.copy_(explained / explained.sum() if explained.any() else equal)

    @torch.no_grad()
    def solve_student_(
        self,
        images: Sequence[torch.Tensor],
        teacher_features: Iterable[torch.Tensor],
        seed: int,
        samples: int = SAMPLES,
    ) -> None:
        """Solve the student's last layer for teacher (first half) and autoencoder (second half), in place.

        Args:
            images: Normal images, each of shape ``(1, 3, H, W)`` in [0, 1].
            teacher_features: The teacher's features of each.
            seed: Seed of the positions that are sampled.
            samples: Positions of all images together.
        """
        pairs = zip(images, teacher_features, strict=True)
        self.student_head.solve_(self.student, images, (self.student_target(*pair) for pair in pairs), seed, samples)
