"""Numbers as people read them: 1.34 M parameters, 12.5 KiB of state. Imports nothing."""

from __future__ import annotations

import math


def count(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix to `unit`: 950, 12.3 k, 1.34 GFLOP."""
    return _scaled(value, 1000, [f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P", "E")])


def size(value: float) -> str:
    """Bytes in three digits and a binary unit: 96 B, 12.5 KiB, 1.20 GiB."""
    return _scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])


def _scaled(value: float, base: int, units: list[str]) -> str:
    if not math.isfinite(value):
        return str(value)
    power = 0
    # 999.6 would print as 1000: round first, then choose the unit.
    while power + 1 < len(units) and abs(_three(value / base**power)) >= base:
        power += 1
    scaled = _three(value / base**power)
    digits = 0 if power == 0 and float(value).is_integer() else max(0, 2 - _magnitude(scaled))
    return f"{scaled:.{digits}f} {units[power]}".rstrip()


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _three(value: float) -> float:
    return round(value, max(0, 2 - _magnitude(value)))
