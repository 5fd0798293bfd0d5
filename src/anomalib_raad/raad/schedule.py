"""The schedule of RAAD inside one fit: train, quantize, fine-tune (paper, sections 3.1 and 4.2)."""

from dataclasses import dataclass
from enum import Enum


class Stage(str, Enum):
    """What a run has reached. Optimizer steps lead to ``trained`` and ``fine_tuned``, quantization lies between."""

    TRAINED = "trained"
    QUANTIZED = "quantized"
    FINE_TUNED = "fine_tuned"

    @property
    def number(self) -> int:
        """1, 2 or 3, as the paper counts."""
        return list(Stage).index(self) + 1


STAGE_CHECKPOINTS = {"trained": "before quantization", "quantized": "after quantization", "model": "after fine-tuning"}
"""The file of each stage's model, without its suffix, and what it is. The last is the one that anomalib saves."""


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

    def __str__(self) -> str:
        return f"train {self.train_steps}, quantize, fine-tune {self.finetune_steps}"

    def stage(self, step: int) -> Stage:
        """The stage that the optimizer step with the number ``step``, counted from 0, leads to."""
        return Stage.TRAINED if step < self.train_steps else Stage.FINE_TUNED

    def progress(self, step: int) -> float:
        """The share of its stage, from 0 to below 1, that lies before the optimizer step ``step``."""
        if self.stage(step) is Stage.TRAINED:
            return step / self.train_steps
        return (step - self.train_steps) / self.finetune_steps


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of each step.

    Attributes:
        lr: Of stage 1.
        finetune_lr: Of stage 3.
        decay: The last share of either stage runs at a tenth.
    """

    lr: float
    finetune_lr: float
    decay: float

    def factor(self, schedule: Schedule, step: int) -> float:
        """The rate of the optimizer step ``step`` as a multiple of ``lr``."""
        stage_factor = self.finetune_lr / self.lr if schedule.stage(step) is Stage.FINE_TUNED else 1.0
        return stage_factor * (0.1 if schedule.progress(step) >= 1 - self.decay else 1.0)
