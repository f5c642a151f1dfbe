"""The inputs of a training from a file: `training.json` of an earlier one, or names and values as JSON or YAML.

Knows such files and the declared inputs; does not know what the inputs mean. Inputs that were given win. An input that is left
out looks like one that was given with its default, so the file decides over those.
"""

import contextlib
import difflib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sdxl.declared_inputs import DeclaredInput
from sdxl.errors import UserInputError, shortened
from sdxl.files.fetching import fetch

_LARGEST = 1 << 20
"""Bytes of such a file."""
_OTHER_NAMES = {"mask_temperature": "clipseg_temperature"}
"""Name in a record → name of the input."""
_OF_THE_MACHINE = ("cuda_graph", "compile_blocks", "fp8")
"""Settings in a record that environment variables decide."""
_EITHER = ("max_train_steps", "num_train_epochs")
"""Only one of these may be given, so one that was given replaces the other."""


def with_config(given: Mapping[str, Any], inputs: Mapping[str, DeclaredInput]) -> dict[str, Any]:
    """`given`, completed by the file that its input `config` names.

    Raises:
        UserInputError: the file cannot be read, names an unknown input, or gives one a value of another type.
    """
    completed = {name: given[name] for name in inputs if name in given}
    source = inputs["config"].typed(completed["config"])
    if source is None:
        return completed
    values = _read(str(source), inputs)
    if any(completed[name] is not None for name in _EITHER):
        values = {name: value for name, value in values.items() if name not in _EITHER}
    for name, value in values.items():
        if inputs[name].typed(completed[name]) == inputs[name].default:
            completed[name] = value
    return completed


def _read(source: str, inputs: Mapping[str, DeclaredInput]) -> dict[str, Any]:
    """The inputs in the file at `source`, a path, a URL or a `data:` URI, each of its declared type."""
    with tempfile.TemporaryDirectory() as scratch:
        path = fetch(source, Path(scratch), max_bytes=_LARGEST)
        name = path.name
        try:
            size = path.stat().st_size
            text = path.read_text() if size <= _LARGEST else ""
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(name) from error
    if size > _LARGEST:
        raise UserInputError(
            f"{name} is larger than a config may be, 1 MiB: give the training.json of a training."
        )
    content = _parsed(text, name)
    if isinstance(settings := content.get("settings"), dict):  # the record of a training
        content = {
            _OTHER_NAMES.get(setting, setting): value
            for setting, value in settings.items()
            if setting not in _OF_THE_MACHINE
        }
    return {str(key): _typed(key, value, inputs, name) for key, value in content.items()}


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = _from_yaml(text, name)
    if not isinstance(content, dict):
        raise _unreadable(name)
    return content


def _from_yaml(text: str, name: str) -> Any:
    try:
        import yaml  # transformers needs it, so it is there
    except ImportError:
        raise _unreadable(name) from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(name) from error


def _unreadable(name: str) -> UserInputError:
    return UserInputError(
        f"{name} is neither JSON nor YAML with names of inputs and their values: give the training.json of a training."
    )


def _typed(key: Any, found: Any, inputs: Mapping[str, DeclaredInput], name: str) -> Any:
    """The value `found` in the type of the input `key`.

    Raises:
        UserInputError: there is no such input, or the value is of another type.
    """
    shown = shortened(str(key))
    declared = inputs.get(key) if isinstance(key, str) else None
    if declared is None or key == "config":
        similar = difflib.get_close_matches(shown, set(inputs) - {"config"}, n=1)
        hint = f"write {similar[0]}, or leave it out" if similar else "leave it out"
        raise UserInputError(f"{name} names {shown}, which is no input of a training: {hint}.")
    value: Any = found
    if value is None and declared.default is None:
        return None
    if declared.kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # 1e-4 is a text in YAML
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if declared.kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif declared.kind is int:
        fits, wanted = is_number and float(cast(Any, value)).is_integer(), "an integer"
    elif declared.kind is float:
        fits, wanted = is_number, "a number"
    else:
        fits, wanted = isinstance(value, str), "a text"
    if not fits:
        raise UserInputError(f"{key} is {shortened(repr(value))} in {name}, but must be {wanted}.")
    return declared.kind(cast(Any, value)) if is_number else value
