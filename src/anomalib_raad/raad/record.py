"""What a run has found out beside its weights, for the checkpoint, the report and the other processes."""

from dataclasses import dataclass, field
from typing import Any

from anomalib_raad.data.drift import Ranges
from anomalib_raad.quantization.recipe import Outcome

from .plan import Plan
from .schedule import Stage

FORMAT = 3
"""Of checkpoints; a model of another format is not read."""


@dataclass
class Record:
    """Filled while a run goes on.

    Attributes:
        seen: Properties of the training images.
        outcome: What quantization found out.
        stages: The figures of each stage that the run has reached, by its name; see :meth:`reached`.
        plan: What a run with a time budget does, so that a resumed one does the same.
    """

    seen: Ranges = field(default_factory=dict)
    outcome: Outcome = field(default_factory=lambda: Outcome({}, []))
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    plan: Plan | None = None

    def reached(self, stage: Stage) -> bool:
        """Whether the run has reached a stage."""
        return stage.value in self.stages

    def step(self, stage: Stage) -> int:
        """The optimizer step at which the run reached a stage."""
        return int(self.stages[stage.value]["step"])

    def state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint that is read without unpickling objects."""
        plan = self.plan.state() if self.plan else None
        outcome = self.outcome.state()
        return {"format": FORMAT, "seen": self.seen, "outcome": outcome, "stages": self.stages, "plan": plan}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Record":
        """Undo :meth:`state`.

        Raises:
            ValueError: If the checkpoint has another format.
        """
        if state.get("format") != FORMAT:
            msg = f"the checkpoint's format is {state.get('format')}, this version reads {FORMAT}; "
            msg += "install the anomalib-raad that wrote it, or train again"
            raise ValueError(msg)
        plan = Plan(**state["plan"]) if state["plan"] else None
        return cls(state["seen"], Outcome.from_state(state["outcome"]), state["stages"], plan)
