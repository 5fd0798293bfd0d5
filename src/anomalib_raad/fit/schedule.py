"""The stages of a fit, and how many optimizer steps the two trained ones have."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from typing_extensions import Self


class Stages(str, Enum):
    """What a run can reach, in order; a model names its own."""

    @property
    def number(self) -> int:
        """From 1, as the papers count."""
        return list(type(self)).index(self) + 1


@dataclass(frozen=True)
class TwoStages:
    """Optimizer steps of two stages, one after the other.

    Attributes:
        SETTINGS: The model's settings for the two lengths, for an error.
        first: Steps of the first stage; 0 where a model has none.
        second: Steps of the second stage, at least 1.
    """

    SETTINGS: ClassVar[str] = "the two lengths"

    first: int
    second: int

    @classmethod
    def scaled(cls, first: int, second: int, total: int) -> Self:
        """Share ``total`` steps in the proportion of the two lengths.

        Raises:
            ValueError: If a stage would be left without a step.
        """
        steps = round(total * first / (first + second))
        if not min(first, 1) <= steps < total:
            msg = (
                f"{total} optimizer steps shared {first}:{second} leave a stage without a step; "
                f"raise max_steps or max_epochs, or change {cls.SETTINGS}"
            )
            raise ValueError(msg)
        return cls(steps, total - steps)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.first + self.second

    def begun(self, step: int) -> bool:
        """Whether the optimizer step ``step``, counted from 0, belongs to the second stage."""
        return step >= self.first

    def progress(self, step: int) -> float:
        """The share of its stage, from 0 to below 1, that lies before the optimizer step ``step``."""
        return (step - self.first) / self.second if self.begun(step) else step / self.first
