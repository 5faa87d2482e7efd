"""Numbers as people read them; what is no number is a dash."""

from collections.abc import Mapping
from typing import Any

MISSING = "\N{EN DASH}"


def percent(share: float | None) -> str:
    return MISSING if not isinstance(share, int | float) else f"{100 * share:.1f}"


def interval(rate: Mapping[str, Any] | None) -> str:
    """The interval of a rate in percent, "52.1 to 62.0"."""
    if not rate or rate.get("low") is None or rate.get("high") is None:
        return ""
    return f"{percent(rate['low'])} to {percent(rate['high'])}"


def number(value: float | None, digits: int = 2) -> str:
    if not isinstance(value, int | float):
        return MISSING
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    if not isinstance(seconds, int | float):
        return MISSING
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def cell(rate: Mapping[str, Any] | None, key: str = "rate") -> str:
    """`rate[key]` in percent, in a second line its interval, for a terminal table."""
    if not rate or rate.get(key) is None:
        return MISSING
    if rate.get("low") is None or rate.get("high") is None:
        return percent(rate[key])
    return f"{percent(rate[key])}\n{100 * rate['low']:.0f}-{100 * rate['high']:.0f}"


def mean_of(share: Any) -> dict[str, Any]:
    """A share that is a mapping with mean, low and high, or a number alone, as a mapping."""
    return dict(share) if isinstance(share, Mapping) else {"mean": share}
