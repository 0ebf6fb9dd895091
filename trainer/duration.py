"""Lengths of training as people write them: "40 steps", "1e6 samples", "3 epochs", "20 minutes"."""

import re
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class Duration:
    """A length of training in steps, samples, epochs or minutes: `"40 steps"`, `"1e6 samples"`."""

    UNITS = ("steps", "samples", "epochs", "minutes")

    def __init__(self, text: "str | Duration") -> None:
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*([a-z]+)\s*", str(text))
        unit = (match[2] if match[2].endswith("s") else match[2] + "s") if match else ""
        if match is None or unit not in self.UNITS:
            raise ValueError(
                f"{str(text)!r} is not a duration: write '40 steps', '1e6 samples', '3 epochs'"
                " or, for checkpoints, '20 minutes'"
            )
        self.value, self.unit = float(match[1]), unit

    def __str__(self) -> str:
        return f"{self.value:.10g} {self.unit}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def to_samples(self, global_batch_size: int, epoch_samples: int) -> int:
        """Length in samples; minutes have none and raise ValueError."""
        if self.unit == "steps":
            return round(self.value * global_batch_size)
        if self.unit == "samples":
            return round(self.value)
        if self.unit == "epochs":
            return round(self.value * epoch_samples)
        raise ValueError(f"{self} has no length in samples; write it in steps, samples or epochs")

    def to_steps(self, global_batch_size: int, epoch_samples: int) -> int:
        """Length in whole steps, rounded up, at least one."""
        return max(1, -(-self.to_samples(global_batch_size, epoch_samples) // global_batch_size))

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.to_string_ser_schema()
        )
