"""The schedule of AAND inside one fit: amplify, distil."""

from anomalib_raad.fit.schedule import Stages, TwoStages


class Stage(Stages):
    """What a run has reached."""

    AMPLIFIED = "amplified"
    DISTILLED = "distilled"


class Schedule(TwoStages):
    """Steps of the amplifiers and of the student."""

    SETTINGS = "amplify_epochs and distill_epochs"

    def __str__(self) -> str:
        return f"amplify {self.first}, distil {self.second}"

    def stage(self, step: int) -> Stage:
        """The stage that the optimizer step with the number ``step``, counted from 0, leads to."""
        return Stage.DISTILLED if self.begun(step) else Stage.AMPLIFIED

    def rate(self, step: int) -> float:
        """The learning rate of a step as a multiple of the highest: a fifth from 80 % of a stage, again from 90 %."""
        progress = self.progress(step)
        return 1.0 if progress < 0.8 else 0.2 if progress < 0.9 else 0.04
