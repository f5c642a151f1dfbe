"""The alpha of each layer in the metadata of diffusers' LoRA files, or in the `adapter_config.json` of a folder of peft.

The metadata is the configuration of peft's adapter for each part, its keys prefixed with the part, such as
`unet.lora_alpha`. Knows how peft reads it; does not know matrices.
"""

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl.errors import WeightsError, shortened

_KEY = "lora_adapter_metadata"
_DEFAULT_ALPHA, _DEFAULT_RANK = 8, 8
"""peft's, where a configuration names none."""
_METHODS = ("LORA", "LOHA", "LOKR")
"""Methods of peft that make sums of small matrices, as its configuration names them."""
_LARGEST_CONFIG = 4 << 20
"""Bytes. A pattern for each layer of SDXL's UNet takes 0.1 million."""
_LONGEST_PATTERN, _MOST_PATTERNS = 500, 10_000
_CAN_BE_SLOW = re.compile(r"[*+?{|(]")
"""Without any of these, an expression has one length and takes no time to match."""
_TIMEOUT_S = 10
_LARGEST_ALPHA = 1e30
"""JSON may hold integers that no float can; weights with a larger alpha would overflow anyway."""
_MATCHER = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
found = [[i for i, name in enumerate(names) if re.match(pattern, name)] for pattern in patterns]
json.dump(found, sys.stdout)
"""


def read_alphas(
    metadata: Mapping[str, str], ranks: Mapping[str, int], file: str, config: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """The alpha of each layer, by default its rank.

    With rank-stabilised LoRA it is multiplied by √rank (arXiv:2312.03732), as the change is later divided by the rank.

    ranks: layer, such as "unet.mid_block.attentions.0.proj_in" → rank of its matrices; 0 for a change without a rank
        (LoKr of two whole matrices), which gets alpha / rank of the configuration, by default 1.
    file: its name in errors.
    config: peft's own configuration of the UNet's adapter; None to look into the metadata.

    Raises:
        WeightsError: the metadata is malformed, contradicts the matrices, or names layers that the file does not have.
    """
    if config is None:
        configs = _configs_of(metadata, file)
    else:
        configs = {f"unet.{setting}": value for setting, value in config.items()}
    alphas = {}
    for part in {layer.partition(".")[0] for layer in ranks}:
        prefix = f"{part}."
        config = {key.removeprefix(prefix): value for key, value in configs.items() if key.startswith(prefix)}
        names = [layer for layer in ranks if layer.startswith(prefix)]
        if not config:
            alphas |= {layer: float(ranks[layer] or 1) for layer in names}
            continue
        given = _by_pattern(config, "alpha_pattern", names, file, must_match=True)
        wanted = _by_pattern(config, "rank_pattern", names, file, must_match=False)
        for layer in names:
            rank = ranks[layer]
            said = wanted.get(layer, config.get("r", rank or _DEFAULT_RANK))
            alpha = given.get(layer, config.get("lora_alpha", config.get("alpha", _DEFAULT_ALPHA)))
            alphas[layer] = _number(alpha, layer, file)
            if rank:
                _check_rank(said, rank, layer, file)
                alphas[layer] *= math.sqrt(rank) if config.get("use_rslora") else 1.0
            else:
                alphas[layer] /= max(_number(said, layer, file), 1.0)
    return alphas


def _configs_of(metadata: Mapping[str, str], file: str) -> dict[str, Any]:
    try:
        configs = json.loads(metadata.get(_KEY) or "{}")
    except (ValueError, RecursionError):
        configs = None
    if not isinstance(configs, dict):
        raise WeightsError(f"{file} has metadata that cannot be read ({_KEY}): save the LoRA again.")
    return configs


def read_config(path: Path) -> dict[str, Any]:
    """Read peft's `adapter_config.json`.

    Raises:
        WeightsError: it is no JSON object, too large, or of a method that is not read here.
    """
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise WeightsError(f"{path.name} cannot be read as a configuration of peft: save the LoRA again.")
    if config.get("peft_type", "LORA") not in _METHODS:
        raise WeightsError(
            f"{path.name} is of the method {_quoted(config['peft_type'])}, but only {', '.join(_METHODS)} are read: give one "
            "of them."
        )
    return config


def _by_pattern(
    config: Mapping[str, Any], setting: str, layers: Sequence[str], file: str, *, must_match: bool
) -> dict[str, Any]:
    """Layer → the value of the first pattern that matches it, for layers with one."""
    patterns = config.get(setting) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise WeightsError(f"{file} has metadata that cannot be read ({setting}): save the LoRA again.")
    values: dict[str, Any] = {}
    for pattern, found in _matches(patterns, layers, file, setting).items():
        if must_match and not found:
            raise WeightsError(
                f"{file} sets {_quoted(pattern)} in {setting}, but no layer in it has that name: save the LoRA again with "
                "the names of its layers."
            )
        for layer in found:
            values.setdefault(layer, patterns[pattern])
    return values


def _matches(patterns: Iterable[str], layers: Iterable[str], file: str, setting: str) -> dict[str, list[str]]:
    """Pattern → the layers that it matches, as peft matches it: a regular expression for the end of a module's name."""
    names = {name: layer for layer in layers for name in _module_names(layer)}
    expressions = {pattern: _compiled(pattern, file, setting) for pattern in patterns}
    slow = [pattern for pattern in expressions if _CAN_BE_SLOW.search(pattern)]
    found_slowly = _match_elsewhere(
        [expressions[pattern].pattern for pattern in slow], list(names), file, setting
    )
    found = dict(zip(slow, found_slowly, strict=True))
    for pattern, expression in expressions.items():
        if pattern not in found:
            found[pattern] = [name for name in names if expression.match(name)]
    return {pattern: [names[name] for name in found[pattern]] for pattern in expressions}


def _compiled(pattern: str, file: str, setting: str) -> re.Pattern[str]:
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of sets in sets
            return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"{file} has {_quoted(pattern)} in {setting}, which is no regular expression of at most "
            f"{_LONGEST_PATTERN} characters: save the LoRA again with the names of its layers."
        ) from error


def _match_elsewhere(
    expressions: Sequence[str], names: Sequence[str], file: str, setting: str
) -> list[list[str]]:
    """The names that each expression matches. Found in a process that can be stopped: an expression from a stranger may
    take years."""
    if not expressions:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _MATCHER],
            input=json.dumps([expressions, names]),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        raise WeightsError(
            f"{file} has regular expressions in {setting} that take too long: save the LoRA again with the names of its "
            "layers."
        ) from error
    matches: list[list[int]] = json.loads(done.stdout)
    return [[names[index] for index in found] for found in matches]


def _module_names(layer: str) -> list[str]:
    """The names of a layer's module in its part. Versions of transformers differ in the level `text_model`."""
    part, _, name = layer.partition(".")
    if part == "unet":
        return [name]
    name = name.removeprefix("text_model.")
    return [name, f"text_model.{name}"]


def _check_rank(said: Any, rank: int, layer: str, file: str) -> None:
    if said != rank:
        raise WeightsError(
            f"{file} gives {layer} the rank {_quoted(said)} in its metadata, but its matrices have rank {rank}: save the LoRA "
            "again."
        )


def _number(alpha: Any, layer: str, file: str) -> float:
    if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST_ALPHA:  # NaN is not either
        raise WeightsError(
            f"{file} gives {layer} the alpha {_quoted(alpha)}, which is no number: save the LoRA again."
        )
    return float(alpha)


def _quoted(value: Any) -> str:
    """A value of the metadata as messages show it."""
    try:
        return shortened(repr(value))
    except RecursionError:
        return "a list that is too deep"
