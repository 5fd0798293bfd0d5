"""Fewer compared channels: the last layers of all three networks projected to k random orthonormal directions.

The anomaly maps know the C channels only by the mean of their squared differences. For a matrix P of k orthonormal
rows, drawn uniformly,

    E[ 1/k || P d ||^2 ] = 1/C || d ||^2 ,

so the maps keep their meaning, and P is folded into weights and biases that are there anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from anomalib_raad.quantization.layers import QuantConv2d

M = TypeVar("M", bound=nn.Module)


class HasHead(Protocol):
    """A network with a last convolution."""

    @property
    def head(self) -> QuantConv2d:
        """The last convolution."""


class Projectable(Protocol):
    """Three networks whose last layers say what the maps compare; the teacher's channels are normalised."""

    @property
    def teacher(self) -> HasHead:
        """Says ``(N, C, h, w)``."""

    @property
    def student(self) -> HasHead:
        """Says ``(N, 2 C, h, w)``."""

    @property
    def ae(self) -> HasHead:
        """Says ``(N, C, h, w)``."""

    teacher_mean: torch.Tensor
    teacher_std: torch.Tensor
    out_channels: int


@torch.no_grad()
def project_(model: Projectable, channels: int, seed: int = 0) -> None:
    """Project what teacher, student and autoencoder say to fewer channels, in place.

    The teacher's channel normalisation is folded into its last layer. Quantized layers stay so, with new scales.

    Args:
        model: Model whose teacher statistics are set.
        channels: Number of directions k.
        seed: Seed of the directions.

    Raises:
        ValueError: If there are not as many channels.
    """
    if not 0 < channels <= model.out_channels:
        msg = f"feature_projection is {channels}; a number of channels from 1 to {model.out_channels} is needed"
        raise ValueError(msg)
    normal = torch.randn(model.out_channels, channels, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(normal)[0].T.to(model.teacher_mean)
    _project_(
        model.teacher.head,
        directions / model.teacher_std.flatten(),
        -directions @ (model.teacher_mean / model.teacher_std).flatten(),
    )
    _project_(model.student.head, torch.block_diag(directions, directions))
    _project_(model.ae.head, directions)
    mean = model.teacher_mean.new_zeros(1, channels, 1, 1)
    model.teacher_mean, model.teacher_std = mean, mean + 1
    model.out_channels = channels


@contextmanager
def projected(module: M, channels: int | None) -> Iterator[M]:
    """Let a module's ``model`` be a projected copy of itself while the context is open; without channels as it is."""
    trained = module.model
    if channels is not None:
        module.model = deepcopy(trained)
        project_(cast("Projectable", module.model), channels)
    try:
        yield module
    finally:
        module.model = trained


def _project_(layer: QuantConv2d, matrix: torch.Tensor, shift: torch.Tensor | float = 0.0) -> None:
    """Let a convolution say ``matrix @ output + shift``."""
    layer.out_channels = len(matrix)
    layer.bias = nn.Parameter(matrix @ layer.bias + shift)
    weight = torch.einsum("ko,oihw->kihw", matrix, layer.quantized_weight())
    layer.weight_quantizer.scale = torch.ones_like(weight[:, :1, :1, :1])
    layer.weight = nn.Parameter(weight)
    layer.set_weight_(weight)
