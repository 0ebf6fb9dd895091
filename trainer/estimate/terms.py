"""A line of an estimate."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """Bytes that one thing takes."""

    name: str
    size: int


def total(terms: list[Term]) -> int:
    """Of all."""
    return sum(term.size for term in terms)
