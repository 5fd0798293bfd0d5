"""What a run of Raad has found out beside its weights."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from anomalib_raad.fit.record import Record
from anomalib_raad.quantization.recipe import Outcome

from .plan import Plan


@dataclass
class RaadRecord(Record):
    """Filled while a run goes on.

    Attributes:
        outcome: What quantization found out.
        plan: The work beside the steps of a run with a time budget, so that a resumed one does the same.
    """

    FORMAT: ClassVar[int] = 4

    outcome: Outcome = field(default_factory=lambda: Outcome({}, []))
    plan: Plan | None = None

    def state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint that is read without unpickling objects."""
        return super().state() | {"outcome": self.outcome.state(), "plan": self.plan.state() if self.plan else None}

    @classmethod
    def _values(cls, state: dict[str, Any]) -> dict[str, Any]:
        plan = Plan(**state["plan"]) if state["plan"] else None
        return super()._values(state) | {"outcome": Outcome.from_state(state["outcome"]), "plan": plan}
