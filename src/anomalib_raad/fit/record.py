"""What a run has found out beside its weights, for the checkpoint, the report and the other processes."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from typing_extensions import Self

from anomalib_raad.data.drift import Ranges


@dataclass
class Record:
    """Filled while a run goes on.

    Attributes:
        FORMAT: Of a model's checkpoints; another is not read.
        seen: Properties of the training images.
        stages: The figures of each stage that the run has reached, by its name; see :meth:`reached`.
        steps: Those of both stages that fit a run's time, so that a resumed run has the same; ``None`` as long as the
            pace is not known, or where time does not matter.
    """

    FORMAT: ClassVar[int]

    seen: Ranges = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: tuple[int, int] | None = None

    def reached(self, stage: Enum) -> bool:
        """Whether the run has reached a stage."""
        return stage.value in self.stages

    def step(self, stage: Enum) -> int:
        """The optimizer step at which the run reached a stage."""
        return int(self.stages[stage.value]["step"])

    def state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint that is read without unpickling objects."""
        return {"format": self.FORMAT, "seen": self.seen, "stages": self.stages, "steps": self.steps}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Undo :meth:`state`.

        Raises:
            ValueError: If the checkpoint has another format.
        """
        if state.get("format") != cls.FORMAT:
            msg = f"the checkpoint's format is {state.get('format')}, this version reads {cls.FORMAT}; "
            msg += "install the anomalib-raad that wrote it, or train again"
            raise ValueError(msg)
        return cls(**cls._values(state))

    @classmethod
    def _values(cls, state: dict[str, Any]) -> dict[str, Any]:
        return {name: state[name] for name in ("seen", "stages", "steps")}
