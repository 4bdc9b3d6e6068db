"""Every check of a run's settings that needs no model: key names, types, ranges, and values that must go together.

Imports no torch, so that a file can be checked on any machine in a moment.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tropd.config import RECOMPUTE, SCHEMA_NAME, ConfigError, TropdConfig, host_and_port, schema_keys

# Recipes a teacher can run without gradients; Megatron's fourth, delayed, is refused by name.
FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8")


def _check_key(key: str, value: object, where: str) -> None:
    known = set(schema_keys())
    if key in known or any(k.endswith(".*") and key.startswith(k[:-1]) for k in known):
        return
    leaf = key.rsplit(".", 1)[-1]
    near = [k for k in known if k.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(sorted(near))}?" if near else "see nemo_tropd/config.py for the keys there are"
    raise ConfigError(key, value, f"{where} has no such key; {hint}")


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse command-line overrides of keys that the schema does not have (Hydra's own message names no remedy).

    Raises:
        ConfigError: an unknown key, or an argument that is not ``key=value``.
    """
    for override in overrides:
        if override.startswith(("-", "hydra.", "hydra/", "~hydra", "+hydra")):
            continue
        key, eq, value = override.partition("=")
        key = key.lstrip("+~")
        if not eq and not override.startswith("~"):
            raise ConfigError(override, "", "the command line takes key=value")
        if "/" not in key:
            _check_key(key, value, "the command line names a key, and the schema")


def check_file(path: Path) -> None:
    """Refuse a configuration file with keys the schema does not have, following its ``defaults``.

    Raises:
        ConfigError: a missing file, an unknown key, a value of the wrong type.
    """
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError("--config-name", path.stem, f"{path.parent} holds no such file; it holds: {', '.join(there)}")
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError("--config-name", path.stem, "the file is not a mapping of keys to values")
    for entry in loaded.pop("defaults", []):
        if isinstance(entry, str) and entry not in ("_self_", SCHEMA_NAME):
            check_file(path.parent / f"{entry}.yaml")

    def walk(node: DictConfig, prefix: str) -> None:
        for k in map(str, node):
            value = node._get_node(k)
            _check_key(
                f"{prefix}{k}",
                "{...}" if isinstance(value, DictConfig) else value,
                f"{path.name} sets it, but the schema",
            )
            if isinstance(value, DictConfig) and not any(s == f"{prefix}{k}.*" for s in schema_keys()):
                walk(value, f"{prefix}{k}.")

    walk(loaded, "")


def check_command_line(argv: Sequence[str], conf_dir: Path, default_name: str = "base") -> DictConfig:
    """Check configuration file and overrides of a command line before Hydra composes them; returns what they compose.

    Raises:
        ConfigError: see :func:`check_file`, :func:`check_overrides`; also values of the wrong type.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    name, overrides, args = default_name, [], list(argv)
    while args:
        arg = args.pop(0)
        if arg in ("--config-name", "-cn") and args:
            name = args.pop(0)
        elif arg.startswith("--config-name="):
            name = arg.split("=", 1)[1]
        elif arg in ("--config-path", "-cp", "--config-dir", "-cd") and args:
            conf_dir = Path(args.pop(0)).absolute()
        elif arg.startswith(("--config-path=", "--config-dir=")):
            conf_dir = Path(arg.split("=", 1)[1]).absolute()
        elif not arg.startswith("-"):
            overrides.append(arg)
    check_file(conf_dir / f"{name}.yaml")
    check_overrides(overrides)
    try:
        with initialize_config_dir(str(conf_dir), version_base=None):
            return compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        text = f"{error.__cause__ or error}\n{error}"
        found = re.search(r"full_key: (\S+)", text) or re.search(r"override '?([\w.]+)=", text)
        first = text.strip().splitlines()[0]
        raise ConfigError(
            found.group(1) if found else name, _value_in(text), f"{first}; give a value of the key's type"
        ) from error
    finally:
        GlobalHydra.instance().clear()


def _value_in(text: str) -> str:
    found = re.search(r"Value '(.*?)'", text)
    return found.group(1) if found else ""


def resolve(cfg: DictConfig) -> TropdConfig:
    """The composed configuration as a checked object of the schema.

    Raises:
        ConfigError: a required key is missing, a value has the wrong type, or values cannot go together.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TropdConfig), cfg)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(key, None, "has no default: set it in the file or on the command line")
        obj = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ConfigError(str(key), _value_in(str(error)), str(error).splitlines()[0]) from error
    assert isinstance(obj, TropdConfig)
    check(obj)
    return obj


def _one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"choose one of {', '.join(repr(a) for a in allowed)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(key, value, f"must be at least {least}")


def check(cfg: TropdConfig) -> None:
    """Every check between keys that needs no model.

    Raises:
        ConfigError: names the key, the value and the remedy.
    """
    m, t, r = cfg.model, cfg.trainer, cfg.model.rollout
    for key, value, allowed in (
        ("trainer.precision", t.precision, ("32", "bf16")),
        ("model.teacher.precision", m.teacher.precision, (None, "32", "bf16")),
        ("model.rollout.dtype", r.dtype, ("float32", "bfloat16")),
        ("model.rollout.placement", r.placement, ("auto", "process", "colocated", "dedicated")),
        ("model.tropd.gate", m.tropd.gate, (None, "bernoulli", "threshold", "soft")),
        ("model.tropd.outlier", m.tropd.outlier, (None, "fkl", "mask", "clip")),
        ("model.tropd.tail", m.tropd.tail, (None, "none", "ghost")),
        ("model.tropd.guidance.prefix_draw", m.tropd.guidance.prefix_draw, ("uniform", "cap")),
        ("model.optim.name", m.optim.name, ("adam", "sgd")),
        ("model.optim.sched.name", m.optim.sched.name, ("constant", "linear", "cosine")),
        ("model.data.overlong", m.data.overlong, ("error", "drop")),
        ("model.recompute", m.recompute, RECOMPUTE),
    ):
        _one_of(key, value, allowed)
    for key, number, least in (
        ("trainer.num_nodes", t.num_nodes, 1),
        ("trainer.devices", t.devices, 1),
        ("trainer.distributed_timeout_s", t.distributed_timeout_s, 1),
        ("trainer.max_restarts", t.max_restarts, 0),
        ("trainer.tropd.max_steps", t.tropd.max_steps, 1),
        ("trainer.tropd.val_check_interval", t.tropd.val_check_interval, 0),
        ("trainer.tropd.save_interval", t.tropd.save_interval, 1),
        ("trainer.tropd.keep_checkpoints", t.tropd.keep_checkpoints, 1),
        ("trainer.tropd.gradient_clip_val", t.tropd.gradient_clip_val, 0),
        ("trainer.tropd.max_skipped_steps", t.tropd.max_skipped_steps, 0),
        ("model.micro_batch_size", m.micro_batch_size, 1),
        ("model.global_batch_size", m.global_batch_size, 1),
        ("model.encoder_seq_length", m.encoder_seq_length, 2),
        ("model.tensor_model_parallel_size", m.tensor_model_parallel_size, 1),
        ("model.pipeline_model_parallel_size", m.pipeline_model_parallel_size, 1),
        ("model.tropd.top_k", m.tropd.top_k, 1),
        ("model.tropd.guidance.max_prefix_tokens", m.tropd.guidance.max_prefix_tokens, 0),
        ("model.rollout.max_new_tokens", r.max_new_tokens, 1),
        ("model.rollout.samples_per_prompt", r.samples_per_prompt, 1),
        ("model.rollout.max_num_seqs", r.max_num_seqs, 1),
        ("model.rollout.top_k", r.top_k, 0),
        ("model.data.max_prompt_tokens", m.data.max_prompt_tokens, 1),
        ("model.data.held_out", m.data.held_out, 0),
        ("model.validation.samples_per_prompt", m.validation.samples_per_prompt, 1),
        ("model.optim.lr", m.optim.lr, 0),
        ("model.optim.sched.warmup_steps", m.optim.sched.warmup_steps, 0),
        ("model.rollout.omp_threads", r.omp_threads, 1),
    ):
        _at_least(key, number, least)
    if t.gpu_memory_gib is not None and t.gpu_memory_gib <= 0:
        raise ConfigError("trainer.gpu_memory_gib", t.gpu_memory_gib, "must be above 0, or null for the device's own")
    _check_rollout(cfg)
    _check_dedicated(cfg)
    _check_layout(cfg)
    _check_lengths(cfg)
    _check_fp8(cfg)


def _check_rollout(cfg: TropdConfig) -> None:
    r, t = cfg.model.rollout, cfg.trainer
    if r.temperature <= 0:
        raise ConfigError("model.rollout.temperature", r.temperature, "must be above 0: TrOPD needs samples")
    if not 0 < r.top_p <= 1:
        raise ConfigError("model.rollout.top_p", r.top_p, "must lie in (0, 1]")
    if r.request_timeout_s <= 0:
        raise ConfigError("model.rollout.request_timeout_s", r.request_timeout_s, "must be above 0")
    if r.request_timeout_s >= t.distributed_timeout_s:
        raise ConfigError(
            "model.rollout.request_timeout_s",
            r.request_timeout_s,
            f"must be below trainer.distributed_timeout_s = {t.distributed_timeout_s}: ranks wait for the engine",
        )


def _check_dedicated(cfg: TropdConfig) -> None:
    if cfg.model.rollout.placement != "dedicated":
        return
    key, d, limit = "model.rollout.dedicated", cfg.model.rollout.dedicated, cfg.trainer.distributed_timeout_s
    why = "model.rollout.placement=dedicated needs"
    if d.address is None:
        raise ConfigError(f"{key}.address", None, f"{why} host:port where rank 0 listens for the engine hosts")
    host_and_port(f"{key}.address", d.address)
    if d.engines is None:
        raise ConfigError(f"{key}.engines", None, f"{why} the number of engine hosts")
    _at_least(f"{key}.engines", d.engines, 1)
    if not 0 < d.timeout_s < limit:
        raise ConfigError(
            f"{key}.timeout_s",
            d.timeout_s,
            f"must be above 0 and below trainer.distributed_timeout_s = {limit}: ranks wait for the engine hosts",
        )


def _check_fp8(cfg: TropdConfig) -> None:
    teacher = cfg.model.teacher
    for key, bound in (
        ("top_k_kl", teacher.admission.top_k_kl),
        ("gate_flips", teacher.admission.gate_flips),
        ("ratio_error", teacher.admission.ratio_error),
        ("prompts", teacher.admission.prompts),
    ):
        _at_least(f"model.teacher.admission.{key}", bound, 0)
    _at_least("model.teacher.fp8_first_last_bf16", teacher.fp8_first_last_bf16, 0)
    if teacher.fp8 is None:
        return
    if teacher.offload and not teacher.fp8_param:
        raise ConfigError(
            "model.teacher.offload",
            True,
            "with fp8_param=false Transformer Engine keeps FP8 copies of the weights that cannot be moved; set "
            "model.teacher.fp8_param=true",
        )
    if teacher.fp8 == "delayed":
        raise ConfigError(
            "model.teacher.fp8",
            "delayed",
            "Transformer Engine updates delayed scales in backward passes, and the teacher has none, so they would "
            "stay at their first value; choose tensorwise or blockwise (Hopper) or mxfp8 (Blackwell)",
        )
    _one_of("model.teacher.fp8", teacher.fp8, (None, *FP8_RECIPES))
    precision = teacher.precision or cfg.trainer.precision
    if precision != "bf16":
        raise ConfigError(
            "model.teacher.precision",
            precision,
            f"model.teacher.fp8 = {teacher.fp8!r} needs a bf16 teacher: set model.teacher.precision=bf16, or fp8=null",
        )
    if teacher.admission.prompts and not cfg.model.data.held_out:
        raise ConfigError(
            "model.data.held_out",
            0,
            "the FP8 teacher is measured on held-out prompts before a run: hold some out, or set "
            "model.teacher.admission.prompts=0 to run unmeasured",
        )


def _check_layout(cfg: TropdConfig) -> None:
    m, t = cfg.model, cfg.trainer
    world = t.num_nodes * t.devices
    launched = os.environ.get("WORLD_SIZE")
    if launched is not None and int(launched) != world:
        raise ConfigError(
            "trainer.devices",
            t.devices,
            f"{launched} processes were launched, but trainer.num_nodes x trainer.devices is {world}: "
            f"launch torchrun with --nproc_per_node={t.devices} on {t.num_nodes} node(s) or change the keys",
        )
    tp, pp = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    if world % (tp * pp):
        raise ConfigError(
            "model.tensor_model_parallel_size",
            tp,
            f"tensor x pipeline parallel is {tp * pp}, which does not divide the {world} processes of "
            f"trainer.num_nodes x trainer.devices",
        )
    if m.sequence_parallel and tp == 1:
        raise ConfigError("model.sequence_parallel", True, "needs model.tensor_model_parallel_size above 1")
    if m.global_batch_size % m.rollout.samples_per_prompt:
        raise ConfigError(
            "model.global_batch_size",
            m.global_batch_size,
            f"must be a multiple of model.rollout.samples_per_prompt = {m.rollout.samples_per_prompt}",
        )
    data = world // (tp * pp)
    if m.global_batch_size % data:
        raise ConfigError(
            "model.global_batch_size", m.global_batch_size, f"must divide by the {data} data-parallel ranks"
        )
    _check_teacher_degree(m.teacher.tensor_model_parallel_size, tp, tp * data)
    if m.optim.distributed and data == 1:
        raise ConfigError("model.optim.distributed", True, "shards over data-parallel ranks, and there is only one")


def _check_teacher_degree(teacher: int | None, tensor: int, stage: int) -> None:
    key = "model.teacher.tensor_model_parallel_size"
    if teacher is None:
        return
    _at_least(key, teacher, 1)
    if tensor % teacher and teacher % tensor:
        raise ConfigError(
            key,
            teacher,
            f"must divide model.tensor_model_parallel_size = {tensor} or be a multiple of it: a teacher group then "
            f"lies within one of the student's, or is made of whole ones",
        )
    if stage % teacher:
        raise ConfigError(
            key, teacher, f"must divide the {stage} ranks of a pipeline stage (tensor x data parallel of the student)"
        )


def _check_lengths(cfg: TropdConfig) -> None:
    m = cfg.model
    g, prompt, response = m.tropd.guidance, m.data.max_prompt_tokens, m.rollout.max_new_tokens
    prefix = g.max_prefix_tokens if g.enabled else 0
    if prompt + response > m.encoder_seq_length:
        raise ConfigError(
            "model.encoder_seq_length",
            m.encoder_seq_length,
            f"a prompt of model.data.max_prompt_tokens = {prompt} and a response of "
            f"model.rollout.max_new_tokens = {response} need {prompt + response}",
        )
    teacher_tokens = m.teacher.response_tokens or m.rollout.max_new_tokens
    if prefix > teacher_tokens:
        raise ConfigError(
            "model.tropd.guidance.max_prefix_tokens",
            prefix,
            f"the teacher writes at most {teacher_tokens} tokens; raise model.teacher.response_tokens or lower this",
        )
    if prompt + teacher_tokens > m.encoder_seq_length:
        raise ConfigError(
            "model.teacher.response_tokens",
            teacher_tokens,
            f"with model.data.max_prompt_tokens = {prompt} it passes model.encoder_seq_length = {m.encoder_seq_length}",
        )
    if m.tokens_per_micro_batch is not None and m.tokens_per_micro_batch < m.encoder_seq_length:
        raise ConfigError(
            "model.tokens_per_micro_batch",
            m.tokens_per_micro_batch,
            f"the longest sequence, model.encoder_seq_length = {m.encoder_seq_length}, must fit one micro-batch; raise "
            f"this, lower that, or set this to null for padded micro-batches",
        )
    if not 0 < g.anneal_fraction <= 1:
        raise ConfigError("model.tropd.guidance.anneal_fraction", g.anneal_fraction, "must lie in (0, 1]")
    if m.sequence_parallel and m.encoder_seq_length % m.tensor_model_parallel_size:
        raise ConfigError(
            "model.encoder_seq_length",
            m.encoder_seq_length,
            f"must divide by model.tensor_model_parallel_size = {m.tensor_model_parallel_size} with sequence parallel",
        )
