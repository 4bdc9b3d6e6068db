"""The rotary embedding that a config.json describes, in the older keys (``rope_theta``, ``rope_scaling``) or the newer
``rope_parameters``, as transformers reads them; and the same for vLLM. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nemo_tropd.convert.config_json import ConversionError, flag, keys, number, positive

KINDS = ("default", "llama3", "yarn", "linear", "dynamic")
_MOST_FACTOR = 1e6
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
# Keys of the kinds above; one that its kind does not use is ignored, as transformers ignores it.
KNOWN = keys(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings attention_factor "
    "beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor"
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed, by ``kind``.

    llama3   wavelengths beyond ``original_max_positions / low_freq_factor`` are stretched by ``factor``, those below
             ``original_max_positions / high_freq_factor`` are kept, those between are blended
    yarn     dimensions that turn less than ``beta_slow`` times in the original length are stretched by ``factor``,
             those that turn more than ``beta_fast`` times are kept; cosine and sine are multiplied by
             ``attention_factor``
    linear   all are stretched by ``factor``
    dynamic  as without scaling within ``max_position_embeddings``; beyond, by the length of the batch: not supported
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 1
    kind: str = "llama3"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def read_rope(config: dict[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling. Raises ConversionError for a kind, key or value that is not modelled."""
    rope = _settings(config, where)
    theta = number(rope if rope.get("rope_theta") is not None else config, "rope_theta", where, 10000.0)
    if theta <= 1:
        raise ConversionError(f"{where}: rope_theta = {theta}: give a number above 1")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        raise ConversionError(f"{where}: unsupported rope type {kind!r}; supported: {', '.join(map(repr, KINDS))}")
    unknown = sorted(key for key in rope.keys() - KNOWN if rope[key] not in (None, False))
    if unknown or rope.get("partial_rotary_factor") not in (None, 1):
        raise ConversionError(f"{where}: unsupported rope keys {unknown or ['partial_rotary_factor']} of {rope!r}")
    if kind == "default":
        return theta, None
    needed = _LLAMA3 if kind == "llama3" else ("factor",)
    if missing := [key for key in needed if key not in rope]:
        raise ConversionError(f"{where}: rope type {kind!r} needs {missing}")
    original = positive(rope, "original_max_position_embeddings", where, max_positions)
    if kind == "llama3":
        factor, low, high = (number(rope, key, where, most=_MOST_FACTOR) for key in _LLAMA3)
        if high <= low:
            raise ConversionError(f"{where}: high_freq_factor = {high} must be greater than low_freq_factor = {low}")
        return theta, RopeScaling(factor, low, high, original)
    if kind == "yarn":
        return theta, _yarn(rope, original, max_positions, where)
    factor = number(rope, "factor", where, most=_MOST_FACTOR)
    return theta, RopeScaling(factor, kind=kind, original_max_positions=original)


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The one dictionary of rotary settings; of settings by layer type, those of full attention."""
    older, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if older and newer and older != newer:
        raise ConversionError(
            f"{where}: rope_scaling = {older!r} and rope_parameters = {newer!r} differ, and programs disagree on which "
            "counts: keep one (transformers 5: rope_parameters, with rope_theta in it)"
        )
    rope = older or newer
    if isinstance(rope.get("full_attention", 0), dict | None):
        rope = rope["full_attention"] or {}
    if not isinstance(rope, dict):
        raise ConversionError(f"{where}: rope settings must be an object, not {rope!r}")
    return rope


def _yarn(rope: dict[str, Any], original: int, max_positions: int, where: str) -> RopeScaling:
    """As transformers computes what is not given. Source: arXiv 2309.00071, section 3.4, and its reference code."""
    factor = number(rope, "factor", where, max_positions / original, _MOST_FACTOR)
    mscale, all_dim = (rope.get(key) and number(rope, key, where) for key in ("mscale", "mscale_all_dim"))

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    usual = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    fast, slow = (number(rope, key, where, value) for key, value in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if fast <= slow:
        raise ConversionError(f"{where}: beta_fast = {fast} must be greater than beta_slow = {slow}")
    return RopeScaling(
        factor,
        original_max_positions=original,
        kind="yarn",
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=number(rope, "attention_factor", where, usual),
        truncate=flag(rope, "truncate", where, True),
    )


def vllm_overrides(config: dict[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """What vLLM must read instead of config.json to compute the same, with all versions from 0.24 on: they know
    different keys of yarn, linear scaling takes no integer, and settings by layer type are not read. Mostly empty."""
    theta, scaling = read_rope(config, max_positions, where)
    kind = scaling.kind if scaling else "default"
    by_layer_type = "full_attention" in (config.get("rope_scaling") or config.get("rope_parameters") or ())
    if kind not in ("yarn", "linear") and not by_layer_type:
        return {}
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    if scaling is None:
        return {"rope_parameters": rope}
    rope |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_max_positions}
    if kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if kind != "yarn":
        return {"rope_parameters": rope}
    rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    # The first is the key of later versions; 0.24 knows the others.
    rope |= {"attention_factor": scaling.attention_factor}
    rope |= {"attn_factor": scaling.attention_factor, "apply_yarn_scaling": False}
    # A sequence may be as long as this, whatever the scaling.
    longest = int(scaling.original_max_positions * scaling.factor)
    return {"rope_parameters": rope, "max_position_embeddings": longest}
