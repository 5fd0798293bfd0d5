"""Uniform quantization of one tensor: the rounding itself, and the search for a grid that rounds with little error.

torch has operators of its own for the rounding (``fake_quantize_per_tensor_affine`` and per channel). They give the
same values, but take four times as long on large maps without gradients, and pass the gradient on half a cell beyond
the grid's ends as well.
"""

from typing import Any, cast

import torch

BITS = (2, 3, 4, 8)
"""Bit-widths of RAAD (paper, section 3.3)."""

_SAFE_SIZE = 128  # integers of an 8-bit weight: 255 * (64 + 64) is the largest multiple of it that 16 bits hold
# Shrunken versions of a tensor's range that the searches try, largest first: clipping a few outliers often costs less
# than a coarse grid. BRECQ tries 80 as well.
_SHRINKS = torch.linspace(1.0, 0.21, 80).tolist()
_SEARCHED_TOGETHER = 2**18  # weights


def check_bits(name: str, bits: int) -> None:
    """Raise ``ValueError`` unless ``bits`` is a bit-width of RAAD."""
    if bits not in BITS:
        msg = f"{name} is {bits!r}; RAAD quantizes to {', '.join(map(str, BITS))} bits"
        raise ValueError(msg)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | int,
    low: int,
    high: int,
) -> torch.Tensor:
    """Round a tensor to a uniform grid and return the real values of the grid points.

    ``(clip(round(x / scale + zero_point), low, high) - zero_point) * scale``

    The gradient passes straight through the rounding and is zero where the value was clipped; for a scale that asks for
    one it is that of learned step sizes (LSQ, arXiv 1902.08153, Eq. 3, without its scaling).

    Args:
        x: Tensor of any shape.
        scale: Distance of two grid points; broadcasts against ``x``.
        zero_point: Integer that stands for 0.0; broadcasts against ``x``.
        low: Smallest integer of the grid.
        high: Largest integer of the grid.

    Returns:
        Tensor of the shape and precision of ``x``. It is rounded in float32: 16-bit floats cannot hold the quotient
        closely enough.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return cast("torch.Tensor", _StraightThrough.apply(x, scale, zero_point, low, high))
    return grid_points(x, scale, zero_point, low, high).mul_(scale)


def grid_points(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | int,
    low: int,
    high: int,
) -> torch.Tensor:
    """:func:`fake_quantize` divided by ``scale``: integers in the precision of ``x``, without a gradient."""
    # In place: the largest maps take more than 32 MB, and memory of that size comes from the kernel, page by page.
    position = x.detach().to(torch.float32, copy=True).div_(scale.detach()).add_(zero_point)
    return position.clamp_(low, high).round_().sub_(zero_point).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """:func:`fake_quantize` in few passes over memory: a fine-tuning step spends its extra time on them."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | int,
        low: int,
        high: int,
    ) -> torch.Tensor:
        position = (x.float() / scale).add_(zero_point)
        clipped = position.clamp(low, high)
        inside = clipped == position
        rounded = clipped.round_().sub_(zero_point)
        saved = [inside]
        if ctx.needs_input_grad[1]:
            # d(rounded * scale) / d scale, where x, and so x / scale, passes straight through the rounding
            saved.append(rounded - inside * position.sub_(zero_point))
            ctx.scale_shape = scale.shape
        ctx.save_for_backward(*saved)
        return rounded.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:  # noqa: ANN401
        inside, *slope = ctx.saved_tensors
        scale_gradient = (gradient.float() * slope[0]).sum_to_size(ctx.scale_shape) if slope else None
        return gradient * inside, scale_gradient, None, None, None


def weight_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed ``bits``-bit weight.

    Of 8 bits a weight uses -64 to 63. Integer kernels for processors without VNNI add the products of two weights with
    two inputs, up to 255 each, in 16 bits and cut the sum off at 32,767: results would depend on the processor.
    """
    size = min(2**bits, _SAFE_SIZE)
    return -size // 2, size // 2 - 1


def input_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of an unsigned ``bits``-bit activation."""
    return 0, 2**bits - 1


@torch.no_grad()
def search_weight_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Find the scale of each output channel that rounds its weights with the least squared error.

    Args:
        weight: Convolution weights of shape ``(out, in, h, w)``.
        bits: Bit-width.

    Returns:
        Scales of shape ``(out, 1, 1, 1)``, all positive.
    """
    # Some channels at a time: every candidate reads all their weights, from the cache if they fit into it.
    channels = max(1, _SEARCHED_TOGETHER // weight[0].numel())
    return torch.cat([_search_weight_scale(some, bits) for some in weight.split(channels)])


def _search_weight_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = weight_range(bits)
    dims = (1, 2, 3)
    full = torch.maximum(weight.amax(dims, keepdim=True) / high, weight.amin(dims, keepdim=True) / low)
    full = full.clamp(min=torch.finfo(weight.dtype).tiny)  # a channel of zeros
    best, least = full.clone(), torch.full_like(full, torch.inf)
    for shrink in _SHRINKS:
        scale = full * shrink
        error = (fake_quantize(weight, scale, 0, low, high) - weight).square().sum(dims, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


@torch.no_grad()
def search_input_grid(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the scale and zero point that round a sample of activations with the least squared error.

    The grid always holds 0.0 exactly, so the zeros of padding and of ReLU stay zeros; for values that are never
    negative the zero point is 0.

    Args:
        values: Sample of activations, any shape, not empty.
        bits: Bit-width.

    Returns:
        The scale, positive, and the integer zero point, both scalars.
    """
    values = values.float().flatten()
    low, high = input_range(bits)
    bottom, top = values.amin().clamp(max=0.0), values.amax().clamp(min=0.0)
    span = (top - bottom).clamp(min=torch.finfo(torch.float32).tiny)
    best, least = (span / high, torch.zeros_like(span)), torch.full_like(span, torch.inf)
    for shrink in _SHRINKS:
        scale = span * shrink / high
        zero_point = (-bottom * shrink / scale).round()
        error = (fake_quantize(values, scale, zero_point, low, high) - values).square().sum()
        if error < least:
            best, least = (scale, zero_point), error
    return best
