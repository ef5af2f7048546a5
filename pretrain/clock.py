"""How long something lasts, and where a training stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic_core import CoreSchema, core_schema

Unit = Literal["steps", "samples", "epochs", "min"]
_UNITS: Mapping[str, Unit] = {
    "step": "steps", "steps": "steps", "sample": "samples", "samples": "samples",
    "epoch": "epochs", "epochs": "epochs", "min": "min", "minute": "min", "minutes": "min",
}  # fmt: skip


@dataclass(frozen=True)
class Duration:
    """A length of training: "800 epochs", "100_000 steps", "12.8e9 samples".

    "30 min" is for saving, evaluating and stopping only.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        number, _, unit = text.strip().partition(" ")
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        known = _UNITS.get(unit.strip().lower())
        if known is None or not 0 <= amount < float("inf"):
            raise ValueError('a duration reads "12 steps", "800 epochs", "12.8e9 samples" or "30 min"')
        return cls(amount, known)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit}"

    def steps(self, batch_size: int, dataset_size: int) -> int:
        """Whole optimizer steps, rounded up so that every sample asked for is seen.

        Raises ValueError for minutes.
        """
        match self.unit:
            case "steps":
                samples = self.amount * batch_size
            case "samples":
                samples = self.amount
            case "epochs":
                samples = self.amount * dataset_size
            case "min":
                raise ValueError("minutes don't fix a number of steps")
        return -(-round(samples) // batch_size)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        def read(value: Any) -> Duration:
            if isinstance(value, Duration):
                return value
            return cls.parse(value if isinstance(value, str) else "")

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.to_string_ser_schema()
        )


@dataclass(frozen=True)
class Progress:
    """The clock of a run. Schedules are functions of it, and it moves on applied steps only."""

    step: int  # applied optimizer steps so far
    samples: int  # samples consumed so far: the data position, which moves on skipped steps too
    total_steps: int
    dataset_size: int  # samples in one epoch

    @property
    def fraction(self) -> float:
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        return self.samples / self.dataset_size

    @property
    def done(self) -> bool:
        return self.step >= self.total_steps

    def consumed(self, samples: int) -> Progress:
        return replace(self, samples=self.samples + samples)

    def applied(self) -> Progress:
        return replace(self, step=self.step + 1)
