"""The ramps of AGPNet: how strong the noise is and how fast the decoder learns, in shares of the run."""

from anomalib_raad.fit.schedule import Stages, TwoStages

_DROP = 0.4  # share of the run after which the learning rate is a tenth
_LEAST_SHARE = 0.6  # of an image's pixels that have noise


class Stage(Stages):
    """What a run has reached."""

    RECONSTRUCTED = "reconstructed"


class Schedule(TwoStages):
    """Steps of the decoder; there is no first stage."""

    SETTINGS = "train_steps"

    def __str__(self) -> str:
        return f"reconstruct {self.total}"

    def stage(self, step: int) -> Stage:
        """The only one, whatever the step."""
        del step
        return Stage.RECONSTRUCTED

    def rate(self, step: int) -> float:
        """The learning rate of a step as a multiple of the highest."""
        return 1.0 if self.progress(step) < _DROP else 0.1

    def alpha(self, step: int) -> float:
        """Strength of the noise on features (Eq. 5): from 0 to 1 in the first 80 % of the run."""
        return min(self.progress(step) / 0.8, 1.0)

    def rho(self, step: int) -> float:
        """Share of the pixels that have noise: from 0.6 to 1 between 20 and 80 % of the run."""
        ramp = min(max((self.progress(step) - 0.2) / 0.6, 0.0), 1.0)
        return _LEAST_SHARE + (1 - _LEAST_SHARE) * ramp
