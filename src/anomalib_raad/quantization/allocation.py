"""How many bits each layer gets: from its score, from a budget, or by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .uniform import BITS, check_bits

DEFAULT_AVERAGE_BITS = 7.5
"""The most bits a weight of teacher and student has on average: PDN-S and autoencoder then take less than a quarter of
their bytes in float32. The paper gives no limits for phi, and no fixed ones serve: training and image size change the
scores threefold. What remains is their order."""


@dataclass(frozen=True)
class Allocation:
    """Where the bits come from.

    Attributes:
        bits: ``None`` for HQS, a number for the same bits in every inner layer of teacher and student, or bits by layer
            name (``{"conv2": 4}``; HQS decides the others).
        first_last_bits: Bits of the first and last layer of teacher and student, unless ``bits`` names them.
        autoencoder_bits: Bits of the autoencoder's layers: no teacher-student pair exists to score them.
        thresholds: HQS places the scores by these limits of phi, see :func:`~.scoring.phi`. ``None``: by their rank.
        average_bits: With the rank, the most bits a weight of teacher and student may have on average.
        activation_bits: Bits of what enters each layer; ``None``: as many as the layer's weights.
    """

    bits: int | Mapping[str, int] | None = None
    first_last_bits: int = 8
    autoencoder_bits: int = 8
    thresholds: tuple[float, float, float] | None = None
    average_bits: float = DEFAULT_AVERAGE_BITS
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        """Check every number."""
        named = self.bits if isinstance(self.bits, Mapping) else {"bits": self.bits} if self.bits is not None else {}
        numbers = {**named, "first_last_bits": self.first_last_bits, "autoencoder_bits": self.autoencoder_bits}
        if self.activation_bits is not None:
            numbers["activation_bits"] = self.activation_bits
        for name, bits in numbers.items():
            check_bits(name, bits)
        limits = self.thresholds
        if limits is not None and (len(limits) != 3 or not 0 < limits[0] < limits[1] < limits[2] < 1):
            msg = f"hqs_thresholds is {limits!r}; three increasing numbers between 0 and 1 are needed"
            raise ValueError(msg)

    def allot(self, scores: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, int]:
        """Bits of each aligned layer of teacher and student.

        Args:
            scores: Score of each layer by name, from first to last.
            weights: Number of weights of each layer.

        Raises:
            ValueError: If ``bits`` names a layer that does not exist or ``average_bits`` is out of reach.
        """
        names, values = list(scores), list(scores.values())
        if isinstance(self.bits, int):
            chosen = [self.first_last_bits, *[self.bits] * (len(names) - 2), self.first_last_bits]
        elif self.thresholds is not None:
            chosen = allot_by_thresholds(values, self.thresholds, self.first_last_bits)
        else:
            sizes = [weights[name] for name in names]
            chosen = allot_by_budget(values, sizes, self.average_bits, self.first_last_bits)
        bits = dict(zip(names, chosen, strict=True))
        if isinstance(self.bits, Mapping):
            if unknown := set(self.bits) - set(names):
                msg = f"bits names the unknown layers {sorted(unknown)}; the layers are {names}"
                raise ValueError(msg)
            bits.update(self.bits)
        return bits


def phi(score: float, thresholds: Sequence[float]) -> int:
    """Turn a score in (0, 1) into a bit-width: a higher score gets more bits.

    Args:
        score: The layer's score.
        thresholds: Three increasing limits; the score's cell among them selects 2, 3, 4 or 8 bits.
    """
    return BITS[sum(score >= threshold for threshold in thresholds)]


def allot_by_budget(
    scores: Sequence[float],
    weights: Sequence[int],
    average_bits: float,
    first_last_bits: int,
) -> list[int]:
    """Give the layers 8 bits and take bits away, from low scores first, until the average is small enough.

    All inner layers go down to 4 bits, one after another, before the first goes down to 3.

    Args:
        scores: Score of each layer.
        weights: Number of weights of each layer.
        average_bits: Most bits a weight may have on average.
        first_last_bits: Bits of the first and the last layer.

    Raises:
        ValueError: If 2 bits in every inner layer are still too many.
    """

    def average() -> float:
        return sum(b * w for b, w in zip(bits, weights, strict=True)) / sum(weights)

    bits = [first_last_bits, *[BITS[-1]] * (len(scores) - 2), first_last_bits]
    by_score = sorted(range(1, len(scores) - 1), key=scores.__getitem__)
    for fewer in reversed(BITS[:-1]):
        for layer in by_score:
            if not average() <= average_bits:  # nor if it is not a number
                bits[layer] = fewer
    if not average() <= average_bits:
        least = f"with first_last_bits {first_last_bits} at least {average():.2f} are needed"
        msg = f"average_bits is {average_bits}; {least}"
        raise ValueError(msg)
    return bits


def allot_by_thresholds(scores: Sequence[float], thresholds: Sequence[float], first_last_bits: int) -> list[int]:
    """Give each layer the bits of its score; the first and the last layer's are fixed (paper, section 4.2)."""
    bits = [phi(score, thresholds) for score in scores]
    bits[0] = bits[-1] = first_last_bits
    return bits
