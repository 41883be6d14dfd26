"""Sizes: which values of a count (head dimension, block size, heads per key head) a backend serves."""

from __future__ import annotations

from dataclasses import dataclass

from inference_shardformer.errors import PluginError


@dataclass(frozen=True)
class Sizes:
    """A set of positive integers: the `choices` if there are any, else the multiples of a step within a range."""

    choices: tuple[int, ...] = ()
    multiple_of: int = 1
    low: int = 1
    high: int | None = None  # included; None: no limit

    def __post_init__(self) -> None:
        positive = min((*self.choices, self.multiple_of, self.low)) >= 1
        if not positive or (self.high is not None and self.smallest > self.high):
            raise PluginError(
                f"{self!r} declares sizes below 1, or none at all",
                remedy="declare positive sizes: Sizes.only(64, 128), Sizes.multiples_of(8, high=256) or ANY_SIZE",
            )

    @classmethod
    def only(cls, *choices: int) -> Sizes:
        """Exactly these."""
        return cls(choices=tuple(sorted(set(choices))))

    @classmethod
    def multiples_of(cls, step: int, *, low: int = 1, high: int | None = None) -> Sizes:
        """Every multiple of `step` from `low` to `high`, both included."""
        return cls(multiple_of=step, low=low, high=high)

    @property
    def smallest(self) -> int:
        """The least size of all."""
        return min(self.choices) if self.choices else -(-self.low // self.multiple_of) * self.multiple_of

    def __contains__(self, size: int) -> bool:
        if self.choices:
            return size in self.choices
        return size >= self.low and size % self.multiple_of == 0 and (self.high is None or size <= self.high)

    def __str__(self) -> str:
        if self.choices:
            return " or ".join(map(str, self.choices))
        bounds = f" from {self.low}" + (f" to {self.high}" if self.high else "")
        limits = bounds if self.low > 1 or self.high else ""
        return f"a multiple of {self.multiple_of}{limits}" if self.multiple_of > 1 else f"any size{limits}"


ANY_SIZE = Sizes()
