"""The autoencoder's first steps: it needs the most and is a twentieth of a joint step, so it takes some by itself."""

import math
import time
from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.progress import progress

from .losses import squared_difference
from .torch_model import RaadModel

AUTOENCODER_STEPS = 100
"""Steps of the autoencoder alone, chosen on cookies and ELPV mono."""

_LR, _WARM_UP = 1e-3, 50
_CELLS = 64  # the autoencoder's output has no more cells a side, so neither need its target


def train_autoencoder_(
    model: RaadModel,
    images: Sequence[torch.Tensor],
    teacher_features: Iterable[torch.Tensor],
    seed: int,
    steps: int,
    batch_size: int = 8,
    seconds: float = math.inf,
) -> None:
    """Minimise L_tae alone for some steps, without augmentation, so that the teacher sees each image only once.

    Args:
        model: Model in evaluation mode whose teacher statistics are set.
        images: Normal images of one size, each of shape ``(1, 3, H, W)`` in [0, 1].
        teacher_features: The teacher's features of each.
        seed: Seed of batches and dropout.
        steps: Optimizer steps.
        batch_size: Images a step.
        seconds: No step begins after so many seconds.
    """
    known = zip(progress(images, "The autoencoder's targets"), teacher_features, strict=True)
    targets = torch.cat([_autoencoder_target(model.normalized_teacher(*pair)) for pair in known])
    optimizer = torch.optim.Adam(model.ae.parameters(), lr=_LR)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / _WARM_UP, total_iters=_WARM_UP)
    devices = [targets.device] if targets.is_cuda else []
    model.ae.train()
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        end = time.monotonic() + seconds
        for _ in progress(range(steps), "Autoencoder's first steps"):
            if time.monotonic() >= end:
                break
            chosen = torch.randint(len(images), (batch_size,)).tolist()
            output = model.ae(torch.cat([images[i] for i in chosen]), targets.shape[-2:])
            loss = squared_difference(targets[chosen], output).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
    model.ae.eval()


def _autoencoder_target(features: torch.Tensor) -> torch.Tensor:
    size = [min(side, _CELLS) for side in features.shape[-2:]]
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False).to(torch.bfloat16)
