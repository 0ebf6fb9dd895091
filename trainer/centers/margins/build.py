"""`[loss]` table -> Margin: published defaults, and one clear error for what does not fit."""

import math
from collections.abc import Callable
from typing import Literal

from trainer.centers.margins.adaface import AdaFace
from trainer.centers.margins.angles import BeyondPi
from trainer.centers.margins.curricularface import CurricularFace
from trainer.centers.margins.elastic import ElasticFace
from trainer.centers.margins.fixed import Combined, SphereFace
from trainer.centers.margins.magface import MagFace
from trainer.centers.margins.margin import Family, Margin
from trainer.centers.margins.sface import SFace
from trainer.config import CENTER_LOSSES, ConfigError, LossConfig

_ANGLE = {"gradient", "beyond_pi"}
_OPTIONS: dict[str, set[str]] = {
    "softmax": set(),
    "cosface": {"margin"},
    "arcface": {"margin"} | _ANGLE,
    "combined": {"margins"} | _ANGLE,
    "sphereface": {"margin", "sphereface_annealing"} | _ANGLE,
    "elastic_arcface": {"margin", "margin_std"} | _ANGLE,
    "elastic_cosface": {"margin", "margin_std"},
    "elastic_arcface_plus": {"margin", "margin_std"} | _ANGLE,
    "elastic_cosface_plus": {"margin", "margin_std"},
    "adaface": {"margin", "adaface_h", "adaface_momentum"} | _ANGLE,
    "magface": {"magface_norms", "magface_margins", "magface_weight"} | _ANGLE,
    "curricularface": {"margin", "curricular_momentum"} | _ANGLE,
    "sface": {"sface"},
}
"""What each loss reads of the table, beside the scale and the filter."""

_JUDGED = set().union(*_OPTIONS.values()) | {
    "label_smoothing",
    "mask_equal_ids",
    "mask_equal_captions",
}
_RIGHT_ANGLE = math.pi / 2


def build_margin(
    config: LossConfig,
    *,
    seed: int = 0,  # of drawn margins
) -> Margin:
    """The margin that `loss.name` and its options ask for; options left alone are as published.

    Raises ConfigError for an option that the loss does not read, or a value it cannot have.
    """
    if config.name not in CENTER_LOSSES:
        raise ConfigError(
            f"loss.name = {config.name!r} has no class centers: choose {', '.join(CENTER_LOSSES)}"
        )
    _check_options(config)
    if config.name.startswith("elastic"):
        family = _build_elastic(config, seed)
    else:
        family = _BUILDERS.get(config.name, _build_fixed)(config)
    return Margin(
        family,
        scale=config.scale,
        statistics=family if isinstance(family, AdaFace | CurricularFace) else None,
        detached=config.gradient == "detached",
        normalised=config.name != "sface",
        filter=config.filter,
        filter_threshold=config.filter_threshold,
    )


def _check_options(config: LossConfig) -> None:
    """An option that is set and not read would be silently without effect."""
    fields = LossConfig.model_fields
    strange = [
        f"loss.{name} = {getattr(config, name)!r}"
        for name in fields
        if name in _JUDGED - _OPTIONS[config.name] and getattr(config, name) != fields[name].default
    ]
    if strange:
        known = ", ".join(sorted(_OPTIONS[config.name])) or "none but scale and filter"
        raise ConfigError(
            f"{', '.join(strange)}: loss.name = {config.name!r} does not read it; leave it out, or "
            f"choose a loss that does (options of {config.name}: {known})"
        )
    if not 0 < config.scale < math.inf:
        raise ConfigError(f"loss.scale = {config.scale}: choose a finite number above 0")


def _build_fixed(config: LossConfig) -> Family:
    margins = {
        "softmax": lambda: (1.0, 0.0, 0.0),
        "cosface": lambda: (1.0, 0.0, _margin(config, 0.35, 2.0)),
        "arcface": lambda: (1.0, _margin(config, 0.5, _RIGHT_ANGLE), 0.0),
        "combined": lambda: _check_margins(config),
    }[config.name]()
    m1, m2, m3 = margins
    beyond_pi = config.beyond_pi or "monotonic"
    if beyond_pi == "easy" and m1 * _RIGHT_ANGLE + m2 > math.pi:
        raise ConfigError(
            f'loss.beyond_pi = "easy" with loss.margins = {margins}: m1 * theta + m2 passes pi '
            'where the cosine is positive; choose smaller ones, or "monotonic"'
        )
    return Combined(m1, m2, m3, beyond_pi)


def _check_margins(config: LossConfig) -> tuple[float, float, float]:
    m1, m2, m3 = config.margins
    if not (0 < m1 <= 10 and 0 <= m2 <= _RIGHT_ANGLE and 0 <= m3 <= 2):
        raise ConfigError(
            f"loss.margins = {config.margins}: give m1, m2, m3 of cos(m1 * theta + m2) - m3, m1 in "
            "(0, 10], m2 in radians in [0, pi/2], m3 in [0, 2]"
        )
    # Where the angle passes pi, c - missing * sin(missing) must lie below the -1 that was reached.
    missing = math.pi - (math.pi - m2) / m1
    rises = math.cos(missing) + missing * math.sin(missing) < 1 and missing > 0
    if (config.beyond_pi or "monotonic") == "monotonic" and rises:
        raise ConfigError(
            f"loss.margins = {config.margins}: for so large an m1 the continuation beyond pi is "
            'not monotonic; choose a smaller one, loss.beyond_pi = "none", or loss.name = '
            '"sphereface"'
        )
    return m1, m2, m3


def _build_sphereface(config: LossConfig) -> Family:
    margin = _margin(config, 1.7, 10.0, least=1.0)
    beyond_pi = config.beyond_pi or "monotonic"
    if beyond_pi == "easy" and margin > 2:
        raise ConfigError(
            f'loss.beyond_pi = "easy" with loss.margin = {margin}: margin * theta passes pi where '
            'the cosine is positive; choose at most 2, or "monotonic"'
        )
    if not all(0 <= number < math.inf for number in config.sphereface_annealing):
        raise ConfigError(
            f"loss.sphereface_annealing = {config.sphereface_annealing}: give start, rate and "
            "floor, none of them negative"
        )
    return SphereFace(margin, beyond_pi, config.sphereface_annealing)


def _build_elastic(config: LossConfig, seed: int) -> Family:
    on: Literal["angle", "cosine"] = "angle" if "arcface" in config.name else "cosine"
    plus = config.name.endswith("_plus")
    published = {"angle": (0.5, 0.0175), "cosine": (0.35, 0.02)}
    mean, plus_std = published[on]
    std = config.margin_std if config.margin_std is not None else plus_std if plus else 0.05
    if not 0 <= std <= 1:
        raise ConfigError(f"loss.margin_std = {std}: choose a standard deviation in [0, 1]")
    return ElasticFace(
        mean=_margin(config, mean, _RIGHT_ANGLE if on == "angle" else 2.0),
        std=std,
        on=on,
        plus=plus,
        beyond_pi=config.beyond_pi or "monotonic",
        seed=seed,
    )


def _build_adaface(config: LossConfig) -> Family:
    beyond_pi = config.beyond_pi or "monotonic"
    if beyond_pi == "easy":
        raise ConfigError(
            'loss.beyond_pi = "easy" does not fit adaface, whose margin may be negative: choose '
            '"monotonic" (as published) or "none"'
        )
    margin = _margin(config, 0.4, _RIGHT_ANGLE)
    return AdaFace(margin, config.adaface_h, config.adaface_momentum, beyond_pi)


def _build_magface(config: LossConfig) -> Family:
    (shortest, longest), (least, most) = config.magface_norms, config.magface_margins
    if not 0 < shortest < longest < math.inf:
        raise ConfigError(
            f"loss.magface_norms = {config.magface_norms}: give the ends of a range above 0"
        )
    if not 0 <= least <= most <= _RIGHT_ANGLE:
        raise ConfigError(
            f"loss.magface_margins = {config.magface_margins}: give two margins in radians, "
            "rising, in [0, pi/2]"
        )
    beyond_pi: BeyondPi = config.beyond_pi or "easy"
    return MagFace(config.magface_norms, config.magface_margins, config.magface_weight, beyond_pi)


def _build_curricularface(config: LossConfig) -> Family:
    margin = _margin(config, 0.5, _RIGHT_ANGLE)
    return CurricularFace(margin, config.curricular_momentum, config.beyond_pi or "monotonic")


def _build_sface(config: LossConfig) -> Family:
    k, a, b = config.sface
    if not (0 < k < math.inf and 0 <= a <= math.pi and 0 <= b <= math.pi):
        raise ConfigError(
            f"loss.sface = {config.sface}: give a steepness k above 0 and two angles a and b in "
            "radians in [0, pi]"
        )
    return SFace(k, a, b)


def _margin(config: LossConfig, published: float, most: float, *, least: float = 0.0) -> float:
    margin = published if config.margin is None else config.margin
    if not least <= margin <= most:
        unit = "in radians " if most == _RIGHT_ANGLE else ""
        raise ConfigError(
            f"loss.margin = {margin}: {config.name} takes a margin {unit}in "
            f"[{least:g}, {most:.4g}]; published is {published:g}"
        )
    return margin


_BUILDERS: dict[str, Callable[[LossConfig], Family]] = {
    "sphereface": _build_sphereface,
    "adaface": _build_adaface,
    "magface": _build_magface,
    "curricularface": _build_curricularface,
    "sface": _build_sface,
}
