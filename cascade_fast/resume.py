"""Whether a run may go on: how it differs from the one that its folder holds, and what is said of that."""

from collections.abc import Mapping
from typing import Any

from cascade_fast.records import RunRecord
from cascade_fast.settings import RESUME_MAY_CHANGE, saved_settings


def settings_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that must not change and do, a phrase each. ``before``: as an earlier run has saved them.

    Raises:
        InputError: ``before`` is no map.
    """
    before = saved_settings(before)
    return [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if name not in RESUME_MAY_CHANGE and before.get(name) != value
    ]


def fingerprint_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What of base and data is another one, a phrase each."""
    return [
        f"the {name} has changed (fingerprint {before.get(name)!s:.12} -> {value:.12})"
        for name, value in now.items()
        if before.get(name) != value
    ]


def version_notes(before: RunRecord, now: RunRecord) -> list[str]:
    """Versions and parts of the machine that are others now: no reason not to go on, but worth a line each."""
    pairs = [(before.versions, now.versions), (before.machine, now.machine)]
    return [
        f"note: {name} was {then.get(name)}, is {value}: results may differ in the last bits"
        for then, here in pairs
        for name, value in here.items()
        if then.get(name) != value
    ]
