"""What a run does in the time that it has: images, positions, iterations and steps.

The work beside the steps gets fixed shares of the time. Where a share is less than the work takes at its usual size,
the work shrinks; what is left belongs to the steps.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from anomalib_raad.fit.time_budget import StepClock, TimeBudget

from .ridge import solve_layer_
from .schedule import Schedule
from .torch_model import RaadModel

_AUTOENCODER, _SOLUTIONS, _IMAGES, _HELD_OUT, _RECONSTRUCTION = 0.1, 0.25, 0.15, 0.1, 0.1  # shares of the time
_SOLUTIONS_A_RUN, _PASSES, _HELD_OUT_PASSES = 3, 6, 4
_TRIAL_ROWS = (128, 384)  # positions of the two trials that tell what a solution takes
_STEP = 4.0  # images without gradients that take as long as a step
_ITERATION = 0.15  # of reconstruction, as a share of a step
_QUANTIZED = 1.5  # what an image takes after quantization, as a multiple of before
_FIXED = 3.0  # seconds for files
_LEAST_IMAGES, _LEAST_STEPS = 20, 4  # that train, whatever the images of a step


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine.

    Attributes:
        image: All three networks on an image, without gradients.
        position: What a position adds to the solution of the student's last layer.
        solution: What a solution takes beside its positions.
    """

    image: float
    position: float
    solution: float


@torch.no_grad()
def measure_pace(model: RaadModel, image: torch.Tensor, solves: bool) -> Pace:
    """Try each kind of work, first once to warm up.

    Args:
        model: The model in evaluation mode.
        image: An image ``(1, 3, H, W)``.
        solves: Whether the run solves the student's last layer; otherwise that takes no time.
    """
    _seconds(model.maps, image)
    seconds = _seconds(model.maps, image)
    if not solves:
        return Pace(seconds, 0.0, 0.0)
    layer, trials = deepcopy(model.student.head), []
    for rows in (_TRIAL_ROWS[0], *_TRIAL_ROWS):
        example = torch.rand(rows, layer.weight[0].numel()).to(image), torch.rand(rows, layer.out_channels).to(image)
        trials.append(_seconds(solve_layer_, layer, [example]))
    _, few, many = trials
    position = max(many - few, 0.0) / (_TRIAL_ROWS[1] - _TRIAL_ROWS[0])
    return Pace(seconds, position, max(few - _TRIAL_ROWS[0] * position, 0.0))


def _seconds(function: Callable[..., object], *arguments: Any) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.monotonic()
    function(*arguments)
    synchronize()
    return time.monotonic() - start


@dataclass(frozen=True)
class Plan:
    """The size of the work beside the steps.

    Attributes:
        calibration_images: Images for statistics, solutions and grids.
        held_out_images: Held-out images for scores and map quantiles.
        samples: Positions that solve the student's last layer.
        iterations: Optimizer steps in which a block learns its rounding.
        autoencoder_seconds: What the autoencoder's first steps may take.
    """

    calibration_images: int
    held_out_images: int
    samples: int
    iterations: int
    autoencoder_seconds: float

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def seconds(self, pace: Pace, validation_images: int) -> tuple[float, float]:
        """What is to be done from the end of stage 1 on beside steps, and the part of it that comes after stage 3."""
        solution = pace.solution + self.samples * pace.position + self.calibration_images * pace.image
        looks = 2 * self.held_out_images + self.calibration_images  # quantiles and weights, and the bias of the maps
        ends = solution + looks * pace.image * _QUANTIZED
        scores = (self.held_out_images + 2 * self.calibration_images) * pace.image + 2 * pace.solution
        reconstruction = 2 * self.iterations * pace.image * _ITERATION * _STEP
        last = ends + validation_images * pace.image * _QUANTIZED + _FIXED
        return 2 * ends + scores + reconstruction + last, last

    def schedule(self, seconds: float, step_seconds: float, done: int, full: Schedule) -> Schedule:
        """Share the steps that fit some seconds among the stages, after ``done`` steps of the first."""
        steps = done + max(round(seconds / step_seconds), 2)
        train = max(round(steps * full.first / full.total), done + 1)
        return Schedule(train, max(steps - train, 1))


_LEAST = Plan(calibration_images=4, held_out_images=1, samples=6_000, iterations=0, autoencoder_seconds=0.0)


def plan(seconds: float, pace: Pace, usual: Plan, validation_images: int, images_a_step: int) -> Plan:
    """Fit the work of the usual size to the seconds that a run has left.

    Args:
        seconds: What is left.
        pace: Of this machine.
        usual: The work where time does not matter.
        validation_images: Images that are predicted when the model is finished.
        images_a_step: Images of an optimizer step.

    Raises:
        ValueError: If even the least work leaves no time for steps; the message names the least time.
    """

    def at_most(name: str, share: float, each: float) -> int:
        fits = int(share * seconds / max(each, 1e-9))
        return min(getattr(usual, name), max(getattr(_LEAST, name), fits))

    autoencoder = _AUTOENCODER * seconds if pace.solution else 0.0  # which both belong to the closed form
    planned = Plan(
        calibration_images=at_most("calibration_images", _IMAGES, _PASSES * pace.image),
        held_out_images=at_most("held_out_images", _HELD_OUT, _HELD_OUT_PASSES * pace.image * _QUANTIZED),
        samples=at_most("samples", _SOLUTIONS, _SOLUTIONS_A_RUN * pace.position),
        iterations=at_most("iterations", _RECONSTRUCTION, 2 * pace.image * _ITERATION * _STEP),
        autoencoder_seconds=autoencoder,
    )
    work = planned.seconds(pace, validation_images)[0] + 2 * planned.calibration_images * pace.image
    steps = max(_LEAST_IMAGES, _LEAST_STEPS * images_a_step) * pace.image * _STEP
    if work + autoencoder + steps > seconds:
        needed = (_LEAST.seconds(pace, validation_images)[0] + steps) / (1 - _AUTOENCODER)
        if needed > seconds:
            msg = f"max_time leaves {seconds:.0f} s; on this machine these images need {needed:.0f} s at least: "
            msg += "raise max_time, or choose smaller images"
            msg += f" or less than {images_a_step} of them a step (train_batch_size)" if images_a_step > 1 else ""
            raise ValueError(msg)
        planned = replace(_LEAST, autoencoder_seconds=autoencoder)
    return planned


class Pacer:
    """Lays out the steps of a run in the time that is left.

    Args:
        budget: The time.
        pace: What the work beside the steps takes.
        validation_images: Images that are predicted when the model is finished.
        full: Gives the proportion of the stages.
        longest: Steps that the run has at most, whatever the time.
        step: Number of the steps taken before.
    """

    def __init__(
        self,
        budget: TimeBudget,
        pace: Pace,
        validation_images: int,
        full: Schedule,
        longest: int,
        step: int,
    ) -> None:
        self.budget = budget
        self.pace = pace
        self.validation_images = validation_images
        self.full = full
        self.longest = longest
        self.clock = StepClock(step)
        self.end_seconds = 0.0  # that the last end of a stage has taken

    def schedule(self, planned: Plan, current: Schedule, step: int, quantized: bool) -> Schedule:
        """The schedule that fits, after ``step`` steps of the pace that the clock has found."""
        work, last = planned.seconds(self.pace, self.validation_images)
        if quantized:
            left = max(self.budget.remaining - max(last, self.end_seconds), 0.0)
            more = max(int(left / self.clock.found), 1)
            fits = Schedule(current.first, step - current.first + more)
        else:
            fits = planned.schedule(self.budget.remaining - work, self.clock.found, step, self.full)
        return fits if fits.total < self.longest else current
