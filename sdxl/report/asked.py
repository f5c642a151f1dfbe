"""The settings of a report: what was asked for, and folded, what the preset and the defaults decided.

Knows settings with their defaults; does not know what they do.
"""

import json
from dataclasses import MISSING, fields
from typing import Any

from sdxl.data.config import PreprocessConfig
from sdxl.report.markup import Html, cut, section, table, tag
from sdxl.report.told import Told
from sdxl.training.config import TrainingOptions
from sdxl.training.presets import resolve

_LONGEST = 1500
"""Characters of a value."""


def asked(told: Told) -> Html:
    """The section with the settings."""
    decided = _decided_by_preset(told)
    defaults = _defaults() | decided
    given = [
        (_named(told, name), _shown(value), _instead_of(name, defaults, decided))
        for name, value in told.asked.items()
    ]
    rest = {name: value for name, value in told.settings.items() if name not in told.asked}
    rest["base"] = told.base  # where a folder is on this machine concerns nobody
    of_preset = [
        (name, _shown(value)) for name, value in rest.items() if name in decided or name == "max_train_steps"
    ]
    others = [(name, _shown(value)) for name, value in rest.items() if name not in dict(of_preset)]
    heads = ("setting", "value")
    return section(
        "settings",
        "What was asked for",
        table((*heads, "instead of"), given, class_="asked")
        if given
        else tag("p", "Nothing but the pictures: all settings have their defaults."),
        tag(
            "details",
            tag("summary", f"Decided by preset {told.settings.get('preset', '')}"),
            table(heads, of_preset),
        )
        if of_preset
        else Html(),
        tag("details", tag("summary", "All other settings"), table(heads, others)) if others else Html(),
    )


def _defaults() -> dict[str, Any]:
    """Setting → its default, for those that have one."""
    return {
        entry.name: entry.default
        for kind in (PreprocessConfig, TrainingOptions)
        for entry in fields(kind)
        if entry.default is not MISSING
    }


def _decided_by_preset(told: Told) -> dict[str, Any]:
    """Setting → what the preset decides if nobody gives it."""
    kept = {
        name: told.settings[name]
        for name in ("token_map", "preset", "optimizer", "is_lora")
        if name in told.settings
    }
    options = TrainingOptions(**kept)
    decided = resolve(options, token_init=told.settings.get("token_init", ""), steps=told.total)
    unused = ("unet_learning_rate",) if options.is_lora else ("lora_rank", "lora_targets", "lora_lr")
    return {name: value for name, value in decided.items() if name not in unused}


def _instead_of(name: str, defaults: dict[str, Any], decided: dict[str, Any]) -> str:
    if name in ("max_train_steps", "num_train_epochs"):
        return "the steps of the preset"
    if name in decided:
        return f"{_shown(decided[name])} of the preset"
    return "the default" if defaults.get(name) is None else _shown(defaults[name])


def _named(told: Told, name: str) -> Html:
    description = (told.described.get(name) or "").partition(". ")[0].rstrip(".")
    return tag("span", tag("code", name), tag("small", description) if description else Html())


def _shown(value: Any) -> str:
    """A value as one would write it as an input."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return _short(value)
    return cut(value if isinstance(value, str) else json.dumps(value), _LONGEST)


def _short(number: float) -> str:
    """A number as people write it: small ones as 3e-4."""
    if 0 < abs(number) < 0.01:
        digits, _, exponent = f"{number:.3e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{number:g}"
