"""Shapes that a loss refuses, each with one line that says what it was given."""

import torch
from torch import Tensor


def check_rows(**sides: Tensor) -> None:
    """Raise ValueError unless all sides are float matrices of one (n, d) shape."""
    for name, rows in sides.items():
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"{name} is {rows.dtype} of shape {tuple(rows.shape)}: give a float (n, d) matrix"
            )
    if len({rows.shape for rows in sides.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in sides.items())
        raise ValueError(f"rows do not match: {shapes}; row i of each belongs to sample i")


def check_scalar(name: str, value: Tensor) -> None:
    """Raise ValueError unless `value` is one number, of shape () or (1,)."""
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: give one number, () or (1,)")


def check_per_row(name: str, values: Tensor | None, rows: Tensor) -> None:
    """Raise ValueError unless `values` is an integer a row, or None."""
    if values is None:
        return
    if values.shape != rows.shape[:1] or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}:"
            f" give one integer a row, ({len(rows)},)"
        )
