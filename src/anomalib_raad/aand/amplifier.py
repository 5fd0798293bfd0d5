"""What amplifies a level of the teacher where it expects an anomaly (Eq. 1 to 5)."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

_MOST_HIDDEN = 1024
_PERIOD = 10_000.0


class Amplifier(nn.Module):
    """Residual gate and attribute-scaling generator of one level: ``F_A = F_T + w d`` (Eq. 1).

    The gate compares each cell with memories of normal and of anomalous cells. The generator scales each channel of a
    cell by a factor between 0 and 2, so no sign changes and a zero stays zero.

    Args:
        channels: C, channels of the level, divisible by 4.
        items: L, items of either memory.
        temperature: tau of Eq. 3 and 4. Without it (1) no normal cell could have a weight below 0.12.

    Raises:
        ValueError: If the channels are not divisible by 4.
    """

    def __init__(self, channels: int, items: int = 50, temperature: float = 0.2) -> None:
        super().__init__()
        if channels % 4:
            msg = f"a level has {channels} channels; the position code needs a number divisible by 4"
            raise ValueError(msg)
        self.temperature = temperature
        self.query = _perceptron(channels)
        self.normal_items = nn.Parameter(torch.randn(items, channels))
        self.anomalous_items = nn.Parameter(torch.randn(items, channels))
        self.scaling = _perceptron(channels)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """The gate before its sigmoid (Eq. 3 and 4), in float32.

        The share of the anomalous items in a softmax over all is a sigmoid of the difference of two logsumexps.

        Args:
            features: F_T, ``(N, C, H, W)``.

        Returns:
            ``(N, 1, H, W)``; its sigmoid is w.
        """
        query = F.normalize(self.query(features + position_code(features)).float(), dim=1)
        normal, anomalous = (
            F.conv2d(query, F.normalize(items.float(), dim=1)[:, :, None, None] / self.temperature).float()
            for items in (self.normal_items, self.anomalous_items)
        )
        return anomalous.logsumexp(1, keepdim=True) - normal.logsumexp(1, keepdim=True)

    def residual(self, features: torch.Tensor) -> torch.Tensor:
        """The residual d of Eq. 5, ``(N, C, H, W)``."""
        return torch.tanh(self.scaling(features)) * features

    def forward(self, features: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """F_A of Eq. 1.

        Args:
            features: F_T, ``(N, C, H, W)``.
            gate: ``(N, 1, H, W)`` instead of the gate's own value, the true labels in stage 1 (Eq. 6).
        """
        gate = self.logits(features).sigmoid() if gate is None else gate
        return features + gate.to(features.dtype) * self.residual(features)


def _perceptron(channels: int) -> nn.Sequential:
    hidden = min(2 * channels, _MOST_HIDDEN)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, 1),
    )


def position_code(features: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of each cell's column (first half of the channels) and row, ``(1, C, H, W)``.

    Places are counted by sums of ones, since OpenVINO cannot read arithmetic on sizes.
    """
    ones = torch.ones_like(features[:1, :1])
    quarter = features.shape[1] // 4
    steps = torch.arange(quarter, device=features.device, dtype=torch.float32)
    frequencies = (_PERIOD ** (-steps / quarter)).to(features.dtype)[None, :, None, None]
    columns, rows = ((ones.cumsum(dim) - 1) * frequencies for dim in (3, 2))
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)
