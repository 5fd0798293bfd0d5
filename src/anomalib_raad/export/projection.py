"""Fewer compared channels: the last layers of all three networks projected to k random orthonormal directions.

The anomaly maps know the C channels only by the mean of their squared differences. For a matrix P of k orthonormal
rows, drawn uniformly,

    E[ 1/k || P d ||^2 ] = 1/C || d ||^2 ,

so the maps keep their meaning, and P is folded into weights and biases that are there anyway.
"""

import torch
from torch import nn

from anomalib_raad.quantization.layers import QuantConv2d, last_layer
from anomalib_raad.torch_model import RaadModel


@torch.no_grad()
def project_(model: RaadModel, channels: int, seed: int = 0) -> None:
    """Project what teacher, student and autoencoder say to fewer channels, in place.

    The teacher's channel normalisation is folded into its last layer. Quantized layers stay so, with new steps.

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
    teacher, student, autoencoder = (last_layer(network) for network in (model.teacher, model.student, model.ae))
    _project_(
        teacher,
        directions / model.teacher_std.flatten(),
        -directions @ (model.teacher_mean / model.teacher_std).flatten(),
    )
    _project_(student, torch.block_diag(directions, directions))
    _project_(autoencoder, directions)
    mean = model.teacher_mean.new_zeros(1, channels, 1, 1)
    model.teacher_mean, model.teacher_std = mean, mean + 1
    model.out_channels = channels


def _project_(layer: QuantConv2d, matrix: torch.Tensor, shift: torch.Tensor | float = 0.0) -> None:
    """Let a convolution say ``matrix @ output + shift``."""
    assert layer.bias is not None  # noqa: S101  # every layer of PDN and autoencoder has one
    layer.out_channels = len(matrix)
    layer.bias = nn.Parameter(matrix @ layer.bias + shift)
    weight = torch.einsum("ko,oihw->kihw", matrix, layer.quantized_weight())
    layer.weight_step = torch.ones_like(weight[:, :1, :1, :1])
    layer.weight = nn.Parameter(weight)
    layer.set_weight_(weight)
