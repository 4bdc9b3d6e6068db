"""Checks of a run's settings that need no model: each value against its key, and what must go together. No torch."""

import importlib.util
import os
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from nemo_tropd.config import ENGINE_TOKENS, ConfigError, TropdConfig, about_teacher, guided, schema_keys, with_teacher
from nemo_tropd.config_keys import bad_value, typed, unknown_key, value_at
from nemo_tropd.config_teacher import DEFAULT_TEACHER, TEACHER_KEYS, TeacherConfig
from nemo_tropd.fields import refused, refused_entries

_SECRET = r"(?:api_?key|access_key|private_key|token|password|passwd|secret|credentials?)"
_interpolated: set[str] = set()  # environment variables that this process's configuration refers to


def resolve(cfg: DictConfig) -> TropdConfig:
    """The composed configuration as a checked object of the schema. Raises ConfigError for an unknown or missing key,
    a value of the wrong type or out of range, and values that cannot go together."""
    merged = typed(cfg)
    _interpolated.update(re.findall(r"oc\.env:\s*([^\s,}]+)", OmegaConf.to_yaml(merged)))
    try:
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(key, None, "has no default: set it in the file or on the command line")
        obj = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        value, reason = value_at(OmegaConf.to_container(merged), key), str(error.msg or error).splitlines()[0]
        if isinstance(error, InterpolationResolutionError):
            raise ConfigError(key, value, f"{reason}; set what it refers to, or give a value") from error
        raise bad_value(key, value, reason) from error
    assert isinstance(obj, TropdConfig)
    for section in obj.model.teachers.values():  # YAML's 32 is the schema's "32", as in a section of its own
        if isinstance(section, dict) and type(section.get("precision")) is int:
            section["precision"] = str(section["precision"])
    check(obj)
    for section, names in (
        (obj.exp_manager, ("exp_dir", "explicit_log_dir")),
        (obj.pretrained_checkpoint, ("restore_from_path",)),
        (obj.model.teacher, ("path", "cache_dir")),
    ):
        for name in names:  # data and templates are expanded where they are opened
            if (value := getattr(section, name)) is not None:
                setattr(section, name, os.path.expanduser(value))
    for teacher in obj.model.teachers.values():
        teacher["path"] = os.path.expanduser(teacher["path"])
    return obj


def without_secrets(text: str) -> str:
    """``text`` with what is assigned to a name like api_key masked, and with ``${oc.env:NAME}`` for the values of
    environment variables with such names and of those that the configuration refers to."""
    for name, value in os.environ.items():
        secret = name in _interpolated or re.search(rf"(?i)(^|_){_SECRET}$", name)
        if secret and value and (text == value or len(value) > 5):
            text = text.replace(value, f"${{oc.env:{name}}}")
    return re.sub(rf"(?i)({_SECRET}['\"]?\s*[:=]\s*)(?!\$\{{)[^\s,}}]+", r"\1***", text)


def yaml_without_secrets(cfg: TropdConfig) -> str:
    """The configuration as YAML, for files that others may read."""

    def mask(node: Any) -> None:
        keys = list(node) if isinstance(node, dict | DictConfig) else range(len(node))
        for key in keys:
            value = node[key]
            if isinstance(value, str):
                named = re.search(rf"(?i)(^|_){_SECRET}$", str(key))
                node[key] = "***" if named else without_secrets(value)
            elif OmegaConf.is_config(value):
                mask(value)

    copy = OmegaConf.structured(cfg)
    mask(copy)
    return OmegaConf.to_yaml(copy)


def check(cfg: TropdConfig) -> None:
    """Every check that needs no model: each value's own range, then what must go together; else ConfigError."""
    _require(
        cfg,
        cfg.model.teacher.fp8 != "delayed",
        "model.teacher.fp8",
        "Transformer Engine updates delayed scales in backward passes, and the teacher has none, so they would stay at "
        "their first value; choose tensorwise or blockwise (Hopper) or mxfp8 (Blackwell)",
    )
    if re.search(r"https?://[^/\s'\"]*@", f"{cfg.model.teacher.url} {cfg.model.teachers}"):
        remedy = "a password in an address would be shown: set NEMO_TROPD_TEACHER_TOKEN to a bearer token"
        raise ConfigError("model.teacher.url", "***", remedy)
    for name, section in cfg.model.teachers.items() if isinstance(cfg.model.teachers, dict) else ():
        if isinstance(section, dict):
            for own, value, wanted in refused_entries(TeacherConfig, TEACHER_KEYS, section):
                raise ConfigError(f"model.teachers.{name}.{own}", value, wanted)
    for key, value, wanted in refused(cfg):
        raise ConfigError(key, value, wanted)
    _check_logging(cfg)
    _check_data(cfg)
    _check_optimizer(cfg)
    _check_engine(cfg)
    _check_layout(cfg)
    _check_following(cfg)
    _require(cfg, DEFAULT_TEACHER not in cfg.model.teachers, "model.teachers", "default is model.teacher: rename it")
    for name in (DEFAULT_TEACHER, *cfg.model.teachers):
        one = with_teacher(cfg, name)
        with about_teacher(name):
            _check_teacher_degree(one)
            _check_lengths(one)
            _check_fp8(one)
            _check_served(one)


def _require(cfg: TropdConfig, satisfied: bool, key: str, remedy: str, effective: object = None) -> None:
    """``effective``: the value that a null at ``key`` stands for."""
    if not satisfied:
        raise ConfigError(key, value_at(cfg, key) if effective is None else effective, remedy)


def _check_logging(cfg: TropdConfig) -> None:
    key, e = "exp_manager", cfg.exp_manager
    directory = f"give a directory, here or in {key}.explicit_log_dir"
    _require(cfg, e.exp_dir is not None or e.explicit_log_dir is not None, f"{key}.exp_dir", directory)
    if e.create_wandb_logger:
        kwargs = f"{key}.wandb_logger_kwargs"
        named = f"{key}.create_wandb_logger=true needs a project or a name: set {kwargs}.project"
        given = sorted(e.wandb_logger_kwargs)  # names alone: a value may be a secret
        _require(cfg, bool({"name", "project"} & set(given)), kwargs, named, given)
        _require(cfg, "version" not in e.wandb_logger_kwargs, f"{kwargs}.version", "NeMo sets it")
        installed = importlib.util.find_spec("wandb") is not None
        _require(cfg, installed, f"{key}.create_wandb_logger", "wandb is not installed: install it, or set false")


def _check_data(cfg: TropdConfig) -> None:
    data, sources = cfg.model.data, "model.data.sources"
    _require(cfg, bool(data.path or data.sources), "model.data.path", f"give the prompts' file, or set {sources}")
    _require(cfg, not (data.path and data.sources), "model.data.path", f"choose: set it to null, or set {sources}=[]")
    for i, name in enumerate(source.get("teacher") for source in data.sources):
        known = (DEFAULT_TEACHER, *cfg.model.teachers)
        if name is not None and name not in known:
            raise ConfigError(
                f"{sources}[{i}].teacher", name, f"model.teachers does not name it; there are {', '.join(known)}"
            )
    routed = data.teacher_key is not None or any(source.get("teacher") for source in data.sources)
    unread = f"no prompt would have them: set model.data.teacher_key, or teacher in {sources}, or leave them out"
    _require(cfg, routed or not cfg.model.teachers, "model.teachers", unread, list(cfg.model.teachers))


def _check_optimizer(cfg: TropdConfig) -> None:
    key, o, steps = "model.optim", cfg.model.optim, cfg.trainer.tropd.max_steps
    _require(cfg, o.sched.min_lr <= o.lr, f"{key}.sched.min_lr", f"must not exceed {key}.lr = {o.lr}")
    late = f"must be below trainer.tropd.max_steps = {steps}: the run would end before its warm-up"
    _require(cfg, o.sched.warmup_steps < steps, f"{key}.sched.warmup_steps", late)
    adam = f"Megatron's distributed optimizer is adam only: choose adam, or set {key}.distributed=false"
    _require(cfg, o.name == "adam" or not o.distributed, f"{key}.name", adam)
    check_decay(cfg)
    for changed in cfg.trainer.tropd.accept_changes:
        if changed not in schema_keys() and not changed.startswith("model.tropd.params."):
            raise unknown_key(changed, None, "trainer.tropd.accept_changes names it, but ")


def check_decay(cfg: TropdConfig) -> None:
    """ConfigError for a schedule that decays to 0 before the run ends, or ends within its warm-up."""
    key, sched, steps = "model.optim.sched.decay_steps", cfg.model.optim.sched, cfg.trainer.tropd.max_steps
    end = sched.decay_steps
    if sched.name == "constant" or end is None:
        return
    warm_up = f"must exceed model.optim.sched.warmup_steps = {sched.warmup_steps}"
    _require(cfg, end > sched.warmup_steps, key, warm_up)
    lost = (
        f"the learning rate ({sched.name}) is 0 after step {end}, so steps {end + 1} to {steps} would learn nothing: "
        f"set {key}={steps} (the rate is then that of a run of {steps} steps), or model.optim.sched.min_lr"
    )
    _require(cfg, end >= steps or sched.min_lr > 0, key, lost)


def _check_engine(cfg: TropdConfig) -> None:
    key, r, limit = "model.rollout", cfg.model.rollout, cfg.trainer.distributed_timeout_s
    below = f"must be below trainer.distributed_timeout_s = {limit}: ranks wait for the engine"
    _require(cfg, r.request_timeout_s < limit, f"{key}.request_timeout_s", below)
    most = max(cfg.model.encoder_seq_length, ENGINE_TOKENS)
    sequences = f"vLLM takes at most {most}, the tokens it computes at a time"
    _require(cfg, r.max_num_seqs <= most, f"{key}.max_num_seqs", sequences)
    sorted_ = (
        f"without {key}.top_k it needs the sorted vocabulary of every token, which the trainer does not make: set "
        f"{key}.top_k too (at most 1024; 20 is common), or top_p=1"
    )
    _require(cfg, r.top_p == 1 or r.top_k > 0, f"{key}.top_p", sorted_)
    if r.placement == "dedicated":
        d, why = r.dedicated, f"{key}.placement=dedicated needs"
        listens = f"{why} host:port where rank 0 listens for the engine hosts"
        _require(cfg, d.address is not None, f"{key}.dedicated.address", listens)
        _require(cfg, d.engines is not None, f"{key}.dedicated.engines", f"{why} the number of engine hosts")
        _require(cfg, d.timeout_s < limit, f"{key}.dedicated.timeout_s", f"{below} hosts")


def _check_fp8(cfg: TropdConfig) -> None:
    key, teacher = "model.teacher", cfg.model.teacher
    if teacher.fp8 is None:
        return
    kept = "with fp8_param=false Transformer Engine keeps FP8 copies of the weights that cannot be moved; set "
    _require(cfg, teacher.fp8_param or not teacher.offload, f"{key}.offload", f"{kept}{key}.fp8_param=true")
    precision = teacher.precision or cfg.trainer.precision
    bf16 = f"{key}.fp8 = {teacher.fp8!r} needs a bf16 teacher: set {key}.precision=bf16, or fp8=null"
    _require(cfg, precision == "bf16", f"{key}.precision", bf16, precision)
    measured = "the FP8 teacher is measured on held-out prompts before a run: hold some out, or set "
    remedy = f"{measured}{key}.admission.prompts=0 to run unmeasured"
    _require(cfg, cfg.model.data.held_out > 0 or not teacher.admission.prompts, "model.data.held_out", remedy)


def _check_following(cfg: TropdConfig) -> None:
    key, t = "model.teacher.follow_steps", cfg.model.teacher
    if t.follow_steps is None:
        return
    _require(cfg, t.fp8 is None, key, "a teacher in FP8 cannot take the student's weights: set model.teacher.fp8=null")
    own = t.tensor_model_parallel_size in (None, cfg.model.tensor_model_parallel_size)
    _require(cfg, own, key, "it must be split as the student is: set model.teacher.tensor_model_parallel_size=null")


def _check_served(cfg: TropdConfig) -> None:
    key, teacher = "model.teacher", cfg.model.teacher
    if not teacher.url:
        return
    for name in ("fp8", "offload", "offload_states", "precision", "tensor_model_parallel_size", "follow_steps"):
        none = "false" if name.startswith("offload") else "null"
        remedy = f"{key}.url leaves the teacher to servers, and this to the options of vllm serve: set it to {none}"
        _require(cfg, not getattr(teacher, name), f"{key}.{name}", remedy)
    one = f"servers give log-probabilities at temperature 1 alone: set it to 1, or {key}.url to null"
    _require(cfg, cfg.model.rollout.temperature == 1, "model.rollout.temperature", one)
    limit, server = cfg.trainer.distributed_timeout_s, f"{key}.server"
    below = f"must be below trainer.distributed_timeout_s = {limit}: ranks wait for the servers"
    _require(cfg, teacher.server.give_up_s < limit, f"{server}.give_up_s", below)
    _require(cfg, teacher.server.timeout_s < limit, f"{server}.timeout_s", below)


def _check_layout(cfg: TropdConfig) -> None:
    m, t = cfg.model, cfg.trainer
    world = t.num_nodes * t.devices
    launched = os.environ.get("WORLD_SIZE", str(world))
    if not launched.isdecimal():
        raise ConfigError("WORLD_SIZE", launched, "the environment variable must be a number, or unset")
    other = (
        f"{launched} processes were launched, but trainer.num_nodes x trainer.devices is {world}: "
        f"launch torchrun with --nproc_per_node={t.devices} on {t.num_nodes} node(s) or change the keys"
    )
    _require(cfg, int(launched) == world, "trainer.devices", other)
    tensor = "model.tensor_model_parallel_size"
    model_ranks = m.tensor_model_parallel_size * m.pipeline_model_parallel_size
    divides = f"does not divide the {world} processes of trainer.num_nodes x trainer.devices"
    _require(cfg, world % model_ranks == 0, tensor, f"tensor x pipeline parallel is {model_ranks}, which {divides}")
    alone = m.sequence_parallel and m.tensor_model_parallel_size == 1
    _require(cfg, not alone, "model.sequence_parallel", f"needs {tensor} above 1")
    size, samples, data = m.global_batch_size, m.rollout.samples_per_prompt, world // model_ranks
    multiple = f"must be a multiple of model.rollout.samples_per_prompt = {samples}"
    _require(cfg, size % samples == 0, "model.global_batch_size", multiple)
    _require(cfg, size % data == 0, "model.global_batch_size", f"must be divisible by the {data} data-parallel ranks")
    one = "shards over data-parallel ranks, and there is only one: set it to false"
    _require(cfg, data > 1 or not m.optim.distributed, "model.optim.distributed", one)


def _check_teacher_degree(cfg: TropdConfig) -> None:
    key, degree = "model.teacher.tensor_model_parallel_size", cfg.model.teacher.tensor_model_parallel_size
    tensor = cfg.model.tensor_model_parallel_size
    stage = cfg.trainer.num_nodes * cfg.trainer.devices // cfg.model.pipeline_model_parallel_size
    if degree is None:
        return
    nested = (
        f"must divide model.tensor_model_parallel_size = {tensor} or be a multiple of it: a teacher group then lies "
        f"within one of the student's, or is made of complete ones"
    )
    _require(cfg, tensor % degree == 0 or degree % tensor == 0, key, nested)
    ranks = f"must divide the {stage} ranks of a pipeline stage (tensor x data parallel of the student)"
    _require(cfg, stage % degree == 0, key, ranks)


def _check_lengths(cfg: TropdConfig) -> None:
    m, longest, limit = cfg.model, cfg.model.encoder_seq_length, "model.encoder_seq_length"
    prompt, response = m.data.max_prompt_tokens, m.rollout.max_new_tokens
    parts = f"a prompt of model.data.max_prompt_tokens = {prompt} and a response of model.rollout.max_new_tokens = "
    _require(cfg, prompt + response <= longest, limit, f"{parts}{response} need {prompt + response}")
    written, guidance = m.teacher.response_tokens or response, m.tropd.guidance
    most = f"the teacher generates at most {written} tokens; raise model.teacher.response_tokens or lower this"
    enough = not guided(cfg) or guidance.max_prefix_tokens <= written
    _require(cfg, enough, "model.tropd.guidance.max_prefix_tokens", most)
    exceeds = (
        f"with model.data.max_prompt_tokens = {prompt} it exceeds {limit} = {longest}: lower it to {longest - prompt}"
    )
    _require(cfg, prompt + written <= longest, "model.teacher.response_tokens", exceeds, written)
    validated = m.validation.max_new_tokens or response
    _require(cfg, prompt + validated <= longest, "model.validation.max_new_tokens", exceeds, validated)
    fits = m.tokens_per_micro_batch is None or m.tokens_per_micro_batch >= longest
    short = (
        f"the longest sequence, {limit} = {longest}, must fit one micro-batch: raise model.tokens_per_micro_batch, "
        f"lower {limit}, or set the former to null for padded micro-batches"
    )
    _require(cfg, fits, "model.tokens_per_micro_batch", short)
    tensor = m.tensor_model_parallel_size
    divisible = f"with sequence parallel it must be divisible by model.tensor_model_parallel_size = {tensor}"
    _require(cfg, not m.sequence_parallel or longest % tensor == 0, limit, divisible)
