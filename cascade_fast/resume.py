"""Whether a run may go on: how it differs from the one that its folder holds, and what is said of that."""

from collections.abc import Mapping
from typing import Any

from cascade_fast.input_checks import check_type
from cascade_fast.records import RunRecord
from cascade_fast.settings import SPLITS, UNITS, RunSettings

# What may differ between a run and its resumption: where things lie and when to stop, not what is computed.
RESUME_MAY_CHANGE = (
    "out", "resume", "max_minutes", "checkpoint_minutes", "cache_dir", "report_to", "sample_prompt", "store", "shard",
)  # fmt: skip


def saved_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run has saved, for :func:`~cascade_fast.settings.make_settings`. A run from before there was
    ``shuffle`` took its texts in the data's own order."""
    check_type("settings", settings, dict)
    return {"shuffle": "off", **settings}


def settings_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that must not change and do, a phrase each. ``before``: as an earlier run has saved them.

    Raises:
        InputError: ``before`` is no map.
    """
    before = {
        **RunSettings().to_dict(),
        **saved_settings(before),
    }  # what there was no setting for was as the default is
    # Earlier versions saved a default size as it was asked for, not as it came out. The data's fingerprint tells.
    unsaid = {f"{split}_{unit}" for split in SPLITS for unit in UNITS if before[f"{split}_{unit}"] is None}
    return [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in now.items()
        if name not in (*RESUME_MAY_CHANGE, *unsaid) and before[name] != value
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
