"""The schedule of RAAD inside one fit: train, quantize, fine-tune (paper, sections 3.1 and 4.2)."""

from dataclasses import dataclass

from anomalib_raad.fit.schedule import Stages, TwoStages


class Stage(Stages):
    """What a run has reached. Optimizer steps lead to ``trained`` and ``fine_tuned``, quantization lies between."""

    TRAINED = "trained"
    QUANTIZED = "quantized"
    FINE_TUNED = "fine_tuned"


STAGE_CHECKPOINTS = {"trained": "before quantization", "quantized": "after quantization", "model": "after fine-tuning"}
"""The file of each stage's model, without its suffix, and what it is. The last is the one that anomalib saves."""


class Schedule(TwoStages):
    """Training is the first stage with steps, fine-tuning the second; quantization lies between."""

    SETTINGS = "train_steps and finetune_steps"

    def __str__(self) -> str:
        return f"train {self.first}, quantize, fine-tune {self.second}"

    def stage(self, step: int) -> Stage:
        """The stage that the optimizer step with the number ``step``, counted from 0, leads to."""
        return Stage.FINE_TUNED if self.begun(step) else Stage.TRAINED


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
        stage_factor = self.finetune_lr / self.lr if schedule.begun(step) else 1.0
        return stage_factor * (0.1 if schedule.progress(step) >= 1 - self.decay else 1.0)
