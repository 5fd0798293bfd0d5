"""The schedule of RAAD inside one fit: train, quantize, fine-tune (paper, sections 3.1 and 4.2)."""

from dataclasses import dataclass
from enum import IntEnum


class Stage(IntEnum):
    """The part of the schedule an optimizer step belongs to; quantization lies between the two."""

    TRAIN = 1
    FINE_TUNE = 3


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps each stage has.

    Attributes:
        train_steps: Steps of stage 1, at least 1.
        finetune_steps: Steps of stage 3, at least 1.
    """

    train_steps: int
    finetune_steps: int

    @classmethod
    def scaled(cls, train_steps: int, finetune_steps: int, total: int) -> "Schedule":
        """Share ``total`` steps in the proportion of the two lengths.

        Raises:
            ValueError: If a stage would be left without a step.
        """
        train = round(total * train_steps / (train_steps + finetune_steps))
        if not 0 < train < total:
            msg = (
                f"{total} optimizer steps shared {train_steps}:{finetune_steps} leave a stage without a step; "
                "raise max_steps or max_epochs, or change train_steps and finetune_steps"
            )
            raise ValueError(msg)
        return cls(train, total - train)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.train_steps + self.finetune_steps

    def progress(self, step: int) -> float:
        """The share of its stage, from 0 to below 1, that lies before the optimizer step ``step``."""
        if self.stage(step) is Stage.TRAIN:
            return step / self.train_steps
        return (step - self.train_steps) / self.finetune_steps

    def stage(self, step: int) -> Stage:
        """The stage of the optimizer step with the number ``step``, counted from 0."""
        return Stage.TRAIN if step < self.train_steps else Stage.FINE_TUNE
