"""What a checkpoint says of its run, and what a resumed run may change: each setting is of one of four kinds.

fixed      the states of one value do not fit another (precision, optimizer): refused
settings   alters draws or loss: refused, unless trainer.tropd.accept_changes names the key
adjustable learning rate, schedule, decay, clipping, max_steps: the new value is used, and a line says so
free       where, how fast and how often something is computed: may change in silence
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import nemo_tropd
from nemo_tropd.config import ConfigError, TropdConfig, anneal_steps, guided, schema_fields
from nemo_tropd.config_checks import check_decay
from nemo_tropd.config_keys import value_at
from nemo_tropd.objectives import Objective
from nemo_tropd.training.objective import IMPORTANCE_CAP

_FIXED = ("trainer.precision", "model.optim.name", "model.optim.distributed")
_MAX_STEPS, _DECAY_STEPS = "trainer.tropd.max_steps", "model.optim.sched.decay_steps"
_ANNEAL_STEPS, _ANNEAL_FRACTION = "model.tropd.guidance.anneal_steps", "model.tropd.guidance.anneal_fraction"
_STEPS_AHEAD, _CAP = "model.rollout.steps_ahead", "model.tropd.params.importance_cap"
_ADJUSTABLE = ("model.optim.", "trainer.tropd.gradient_clip_val", _MAX_STEPS)
# Keys of model. that alter neither draws nor loss beyond rounding. Every other one does, new ones among them. The data
# are compared by their tokens, models by their weights.
_FREE = tuple(
    "model." + key
    for key in (
        *("micro_batch_size", "tokens_per_micro_batch", "recompute", "encoder_seq_length"),
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "tropd.chunk_tokens"),
        *("teachers", "teacher.path", "teacher.tensor_model_parallel_size", "teacher.cache_dir", "teacher.offload"),
        *("teacher.score_early",),
        *("teacher.admission.", "rollout.placement", "rollout.dedicated.", "rollout.sleep", "rollout.torch_compile"),
        *("rollout.max_num_seqs", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization", "rollout.omp_threads"),
        *("rollout.request_timeout_s", "data.", "validation.", "teacher.url", "teacher.server."),
    )
)

SERVED = "of a server"  # the digest of a teacher that no folder here has


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: names the path, what is wrong and what to do."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps besides weights and optimizer states: draws, data order, schedule and prefix length are
    functions of it. What is compared by content is a dictionary with its ``digest`` and, for messages, its ``path`` and
    the ``keys`` that make it."""

    step: int  # optimizer steps done
    settings: dict[str, Any] = field(default_factory=dict)  # by key
    adjustable: dict[str, Any] = field(default_factory=dict)  # by key
    run_id: str = ""  # of the run's first start
    skipped_steps: int = 0
    skipped_in_a_row: int = 0  # the last steps done
    version: str = nemo_tropd.__version__
    # Rollouts of later steps that the checkpoint has: the version of their weights by step, and the file's bytes.
    ahead: dict[int, int] = field(default_factory=dict)
    ahead_bytes: int = 0
    served: dict[str, Any] = field(default_factory=dict)  # of teachers behind servers, by name: what tells them apart

    @classmethod
    def read(cls, saved: dict[str, Any], where: object) -> RunState:
        """The state in a checkpoint at ``where``; fields that this version does not know are ignored. Raises
        CheckpointError if another version wrote it, without a field that is needed."""
        known = {f.name for f in fields(cls)}
        if not {"step", "settings", "adjustable"} <= saved.keys():
            raise CheckpointError(
                f"{where} was written by another version of nemo_tropd ({saved.get('version', 'before 0.1.0')}; this "
                f"is {nemo_tropd.__version__}): resume it with that version, or start another run from its exported "
                f"weights with exp_manager.explicit_log_dir"
            )
        return cls(**{k: v for k, v in saved.items() if k in known})


def first_state(cfg: TropdConfig, objective: Objective, contents: dict[str, Any], run_id: str) -> RunState:
    """The state of a run before its first step. ``contents``: what is compared by content, by key."""
    settings, adjustable = dict(contents), {}
    for key, value in ((key, value_at(cfg, key)) for key, f in schema_fields() if "check" in f.metadata):
        if key == _MAX_STEPS or (key.startswith(_ADJUSTABLE) and key not in _FIXED):
            adjustable[key] = value
        elif key == "trainer.precision" or (key.startswith("model.") and not key.startswith(_FREE)):
            settings[key] = value
    m = cfg.model
    # At the end: the key that such a value was taken from is named before it.
    for key, value in (
        ("model.teacher.precision", m.teacher.precision or cfg.trainer.precision),
        ("model.teacher.response_tokens", m.teacher.response_tokens or m.rollout.max_new_tokens),
        ("model.tropd.guidance.enabled", guided(cfg)),
    ):
        settings.pop(key)
        settings[key] = value
    for name in ("gate", "outlier", "tail", "guidance_weight", "params"):
        del settings[f"model.tropd.{name}"]  # an objective's own defaults stand for null: see what it became
    for f in fields(objective):
        own = hasattr(m.tropd, f.name.rstrip("_"))
        settings[f"model.tropd.{'' if own else 'params.'}{f.name.rstrip('_')}"] = getattr(objective, f.name)
    settings, adjustable = json.loads(json.dumps([settings, adjustable], default=str))  # lists and tuples are one
    return RunState(0, settings, adjustable, run_id)


def settled(cfg: TropdConfig, saved: RunState | None) -> TropdConfig:
    """``cfg`` with the steps at which schedule and prefixes end as numbers: those of the run's first start, so that a
    raised max_steps rewinds neither. ConfigError if the learning rate would be 0 before the run ends."""
    cfg = copy.deepcopy(cfg)
    sched, guidance = cfg.model.optim.sched, cfg.model.tropd.guidance
    was = saved.adjustable if saved else {}
    if sched.decay_steps is None:
        kept = was.get(_DECAY_STEPS) if was.get("model.optim.sched.name", "constant") != "constant" else None
        sched.decay_steps = kept or cfg.trainer.tropd.max_steps
    if guidance.anneal_steps is None:
        same = saved is not None and saved.settings.get(_ANNEAL_FRACTION) == guidance.anneal_fraction
        guidance.anneal_steps = (saved.settings.get(_ANNEAL_STEPS) if saved and same else None) or anneal_steps(cfg)
    check_decay(cfg)
    return cfg


def check_resumable(saved: RunState, now: RunState, accepted: Collection[str] = ()) -> list[str]:
    """What has changed since the checkpoint and is used from here on, a line each. Raises ConfigError, with both
    values, if a setting that alters draws or loss has changed and is not ``accepted``, or one that cannot change at
    all."""
    both = [key for key in now.settings if key in saved.settings]  # others: of another version
    changed = [key for key in both if _identity(saved.settings[key]) != _identity(now.settings[key])]
    follows = {_CAP} if _STEPS_AHEAD in changed and all(map(_cap_follows, (saved.settings, now.settings))) else set()
    others = [key for key in changed if key not in follows]  # what follows is accepted with what it follows from
    for key in sorted(others, key=lambda key: key not in _FIXED):
        if key in accepted and key not in _FIXED:
            continue
        remedy = (
            f"; restore that value, set exp_manager.explicit_log_dir to start another run, or continue this one with "
            f"the new value: trainer.tropd.accept_changes='[{','.join(dict.fromkeys([*accepted, *others]))}]'"
        )
        if key in _FIXED:
            remedy = (
                ", and its optimizer states do not fit another value; restore that, or start another run "
                "(exp_manager.explicit_log_dir) from its weights, which examples/convert_checkpoint.py megatron-to-hf "
                "exports"
            )
        was = f"the run's checkpoint was made with {_shown(saved.settings[key])!r}"
        raise ConfigError(key, _shown(now.settings[key]), was + _cause(saved.settings[key], now.settings[key]) + remedy)
    longest = now.adjustable.get(_MAX_STEPS, saved.step)
    if longest < saved.step:
        why = f"the run's checkpoint has {saved.step} steps already; give at least as many"
        raise ConfigError(_MAX_STEPS, longest, why)
    lines = [
        f"{key}: {_shown(saved.settings[key])} up to step {saved.step}, {_shown(now.settings[key])} from here on"
        for key in changed
    ]
    lines += [
        f"{key}: {saved.adjustable[key]} up to step {saved.step}, {value} from here on"
        for key, value in now.adjustable.items()
        if key in saved.adjustable
        and saved.adjustable[key] != value
        and (key != _DECAY_STEPS or now.adjustable.get("model.optim.sched.name") != "constant")
    ]
    if longest > saved.adjustable.get(_MAX_STEPS, longest):
        lines += [f"  {line}" for line in _ends(now)]
    return lines


def _cap_follows(settings: dict[str, Any]) -> bool:
    """Whether a run's cap is what it is if nothing sets it."""
    return bool(settings.get(_CAP) == (IMPORTANCE_CAP if settings[_STEPS_AHEAD] else None))


def _ends(now: RunState) -> Iterator[str]:
    name = now.adjustable.get("model.optim.sched.name", "constant")
    if name != "constant":
        yield f"the learning rate ({name}) still ends at step {now.adjustable[_DECAY_STEPS]} ({_DECAY_STEPS})"
    if now.settings.get("model.tropd.guidance.enabled"):
        yield f"teacher prefixes still end at step {now.settings[_ANNEAL_STEPS]} ({_ANNEAL_STEPS})"


def _cause(was: Any, now: Any) -> str:
    """Which of the keys that make a content have changed."""
    keys = now.get("keys") if isinstance(now, dict) else None
    if not keys:
        return ""
    before = was.get("keys") if isinstance(was, dict) else None
    if not before:
        return f" (with these files, or with other values of {', '.join(keys)})"
    other = [f"{k} was {before[k]!r}, and is {v!r}" for k, v in keys.items() if k in before and before[k] != v]
    return f" ({'; '.join(other) or 'what the files hold has changed, or the template or tokenizer'})"


def _identity(value: Any) -> Any:
    return value["digest"] if isinstance(value, dict) and "digest" in value else value


def _shown(value: Any) -> Any:
    if isinstance(value, dict) and "digest" in value:
        return f"{value.get('path')} (content {value['digest'][:12]})"
    return value
