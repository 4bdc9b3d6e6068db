"""The schema of a run: every key with its default, the values it takes, and its meaning. Imports no torch.

Sections and keys keep NeMo-Aligner's names; ``model.tropd``, ``model.teacher``, ``model.rollout``, ``model.data`` and
``model.validation`` are ours. The dataclasses hold the only defaults: files in ``conf/`` say what differs from them.
``model.data`` is in config_data.py, ``model.teacher`` in config_teacher.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from nemo_tropd.config_data import DataConfig
from nemo_tropd.config_teacher import DEFAULT_TEACHER, TEACHER_KEYS, TeacherConfig
from nemo_tropd.fields import (
    ENDPOINT_WANTED,
    ENTRIES,
    FREE_FORM,
    NAMES,
    TOKENS,
    choice,
    endpoint,
    file_name,
    flag,
    integer,
    named_sections,
    number,
    split_endpoint,
    text,
)

ENGINE_TOKENS = 2048  # what the engine computes at a time at least, and so the most sequences
SCHEMA_NAME = "tropd_schema"
RECOMPUTE = (None, "selective", "full")
RENDEZVOUS_PORT = 29400  # torchrun's own default
IMITATING = ("tropd", "tropd_exact", "tropd_aopd")  # objectives with a loss on teacher prefixes by themselves
LONGEST_S = 10**6  # in milliseconds, waits of the operating system take 32 bits


class ConfigError(ValueError):
    """A setting that cannot work: names the key, the value seen and what to change."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.value, self.remedy), self.__dict__  # with its notes


@dataclass
class TropdTrainerConfig:
    """The loop: how long, how often."""

    max_steps: int = integer(200, at_least=1)
    """Optimizer steps; each takes one global batch of fresh rollouts (the paper: 200)."""
    val_check_interval: int = integer(20, at_least=0)
    """Steps between validations on held-out prompts; 0 validates only before and after."""
    save_interval: int = integer(20, at_least=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = integer(2, at_least=1)
    """Complete checkpoints kept; older ones are removed once a newer one is complete."""
    gradient_clip_val: float = number(1.0, at_least=0)
    """Largest global gradient norm (L2); 0 leaves gradients as they are."""
    max_skipped_steps: int = integer(5, at_least=0)
    """Consecutive steps that may be skipped because logits, loss or gradient are not finite; one more ends the run."""
    accept_changes: list[str] = field(default_factory=list, metadata=NAMES)
    """Keys that a resumed run may change although they alter draws or loss, e.g. [model.tropd.objective]; other such
    changes are refused. A changed learning rate, schedule or number of steps needs no consent, see conf/README.md."""


@dataclass
class TrainerConfig:
    num_nodes: int = integer(1, at_least=1)
    devices: int = integer(1, at_least=1)
    """Processes per node, as torchrun's --nproc_per_node."""
    gpu_memory_gib: float | None = number(None, above=0)
    """Memory of a GPU that the plan may use, GiB (an 80 GB GPU reports 79): to plan for another machine, or to leave a
    part of this one's alone; null: what the device reports, or on a machine without one the host's."""
    precision: str = choice("bf16", "32")
    """Student's compute precision: "32" or "bf16" (bf16 keeps fp32 master weights and fp32 gradients)."""
    distributed_timeout_s: int = integer(3600, at_least=1, at_most=LONGEST_S)
    """Seconds a collective may take before the run exits; must exceed model.rollout.request_timeout_s, since the other
    ranks wait while the engine generates. The ranks that do not answer are named within this time."""
    max_restarts: int = integer(3, at_least=0)
    """Times docker/launch.sh restarts a run's processes after one of them died; the run resumes from its last complete
    checkpoint."""
    stop_timeout_s: int = integer(150, at_least=1, at_most=LONGEST_S)
    """Seconds after a signal in which a run under docker/launch.sh must have saved and ended; then it is killed, and
    resumes from its last checkpoint. A scheduler's notice must be longer (docker/README.md)."""
    rendezvous: str | None = endpoint(None, default_port=RENDEZVOUS_PORT)
    """Rendezvous endpoint of a multi-node run: host:port on one of its nodes (port 29400 if only a host is given);
    null: from the scheduler's variables."""
    tropd: TropdTrainerConfig = field(default_factory=TropdTrainerConfig)


@dataclass
class ExpManagerConfig:
    """Passed to NeMo's exp_manager."""

    explicit_log_dir: str | None = text(None)
    """The run directory itself; overrides exp_dir."""
    exp_dir: str | None = text("runs", optional=True)
    """The run directory is exp_dir/name."""
    create_tensorboard_logger: bool = flag(True)
    create_wandb_logger: bool = flag(False)
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    resume_if_exists: bool = flag(True)
    """Resume from the last complete checkpoint of the run directory; false refuses a directory that has one."""


@dataclass
class PretrainedCheckpointConfig:
    restore_from_path: str = text(MISSING)
    """The student: a Hugging Face checkpoint directory."""


@dataclass
class SchedConfig:
    name: str = choice("constant", "linear", "cosine")
    """constant, linear or cosine, after the warm-up."""
    warmup_steps: int = integer(0, at_least=0)
    min_lr: float = number(0.0, at_least=0)
    decay_steps: int | None = integer(None, at_least=1)
    """The step at which linear and cosine reach min_lr; null: trainer.tropd.max_steps at the run's first start. With
    min_lr = 0 the last step still has a little: the step after it would have none."""


@dataclass
class OptimConfig:
    name: str = choice("adam", "sgd")
    """adam (decoupled weight decay, as Megatron's) or sgd."""
    lr: float = number(5e-6, at_least=0)
    """The paper's constant 5e-6."""
    weight_decay: float = number(0.0, at_least=0)
    betas: tuple[float, float] = number((0.9, 0.95), at_least=0, below=1)
    eps: float = number(1e-8, above=0)
    distributed: bool = flag(False)
    """Megatron's distributed optimizer: shards states over data-parallel ranks."""
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass
class GuidanceConfig:
    """Off-policy guidance: the student continues teacher-generated prefixes (method, section 3.3)."""

    enabled: bool | None = flag(None)
    """null: if the objective has a loss on them, that is a guidance_weight, as tropd, tropd_exact and tropd_aopd have
    by themselves; the others are then trained as published, without prefixes."""
    max_prefix_tokens: int = integer(256, at_least=0)
    """L of L_max(step) = L (1 + cos(pi step / total)) / 2."""
    prefix_draw: str = choice("uniform", "cap")
    """uniform samples the length from 0 .. L_max; cap uses L_max. The paper does not say which."""
    anneal_fraction: float = number(1.0, above=0, at_most=1)
    """Share of trainer.tropd.max_steps, as it is at the run's first start, after which the prefix length is 0 (the
    paper: all of them)."""
    anneal_steps: int | None = integer(None, at_least=1)
    """The step at which the prefix length is 0; null: from anneal_fraction."""


@dataclass
class ObjectiveConfig:
    objective: str = text("tropd")
    """A name of nemo_tropd.objectives."""
    gate: str | None = choice(None, "bernoulli", "threshold", "soft")
    """bernoulli, threshold or soft; null: the objective's own default."""
    outlier: str | None = choice(None, "fkl", "fkl_full", "mask", "clip")
    """fkl, mask or clip, with tropd_exact fkl or fkl_full; null: the objective's own default."""
    tail: str | None = choice(None, "none", "ghost")
    """none or ghost; null: the objective's own default."""
    guidance_weight: float | None = number(None, at_least=0)
    """beta_g, the weight of imitation on teacher prefixes; null: the objective's own (0.001 of tropd, tropd_exact and
    tropd_aopd; the others have none)."""
    params: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    """Further parameters of the objective by name, e.g. {tau: -3.0}. Every objective knows importance_cap: each student
    token's loss times min(exp(trainer's - engine's log-probability), cap), detached; unset: no weights."""
    top_k: int = integer(64, at_least=1)
    """Teacher candidates per token."""
    chunk_tokens: int | None = integer(None, at_least=1)
    """Tokens whose logits exist at a time; null: chosen from a memory bound."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


@dataclass
class DedicatedConfig:
    """Engines on hosts of their own, each started by ``python -m nemo_tropd.rollout.engine_host``; read only with
    model.rollout.placement=dedicated."""

    address: str | None = endpoint(None)
    """HOST:PORT where rank 0 listens for the engine hosts, on the interface of that host alone (127.0.0.1: this machine
    only). Both sides prove a shared secret first (NEMO_TROPD_SECRET, or NEMO_TROPD_SECRET_FILE names its file; the
    launcher makes one if neither is set); what follows is not encrypted."""
    engines: int | None = integer(None, at_least=1)
    """How many engine hosts there are."""
    timeout_s: float = number(300.0, above=0, at_most=LONGEST_S)
    """Seconds for all engine hosts to join, and for a host to take a bucket of weights."""
    queue: bool = flag(False)
    """Hosts take requests from one queue, the longest expected first, instead of having a fixed share of each batch:
    none waits for the one with the longest responses. What a host generates together then depends on who was faster,
    and the last bits with it: a resumed run goes on alike, but no longer bit by bit (conf/README.md)."""


@dataclass
class RolloutConfig:
    """vLLM."""

    placement: str = choice("auto", "process", "colocated", "dedicated")
    """process: a child process of rank 0; colocated: in every rank's own process, on its GPU, split like the student,
    weights updated in place; dedicated: on hosts of their own, weights broadcast to them; auto: colocated on a
    GPU (without pipeline parallelism), else process."""
    dedicated: DedicatedConfig = field(default_factory=DedicatedConfig)
    steps_ahead: int = integer(0, at_least=0, at_most=8)
    """Generate the rollouts of step n by the weights of n - steps_ahead, while steps before it train; 0: by those of
    step n, in turns with the trainer. Not colocated. Sampled objectives then weight each student token
    (model.tropd.params.importance_cap, 2 unless set)."""
    sleep: bool = flag(True)
    """Colocated: the engine leaves the GPU's memory to the trainer between rollouts."""
    torch_compile: bool = flag(True)
    """Colocated: vLLM fuses kernels by torch.compile, about a minute more at the first start; CUDA graphs are used
    either way."""
    dtype: str = choice("bfloat16", "float32")
    """float32 or bfloat16."""
    temperature: float = number(1.0, at_least=0.01, at_most=2)
    """Student and teacher are sampled, scored and trained as softmax(logits / temperature). Above 0, since TrOPD needs
    samples; vLLM raises anything below 0.01 to that, and accepts at most 2."""
    top_p: float = number(1.0, above=0, at_most=1)
    """Of what top_k leaves, the fewest tokens with this mass; below 1 only with top_k. The loss takes log-probabilities
    under what was sampled from; forward KL and prefixes those of the complete softmax."""
    top_k: int = integer(0, at_least=0, at_most=1024)
    """The most probable tokens that may be sampled; 0: the entire vocabulary."""
    max_new_tokens: int = integer(8096, at_least=1)
    end_tokens: list[Any] = field(default_factory=list, metadata=TOKENS)
    """Tokens that end a response, as texts or ids, in the student's and the teacher's engine, e.g. ["<|im_end|>"];
    empty: all that the config files and tokenizers of both name. The plan prints them."""
    samples_per_prompt: int = integer(4, at_least=1)
    max_num_seqs: int = integer(256, at_least=1)
    kv_cache_gib: float = number(1.0, above=0)
    """Memory of the engine's key-value cache (CPU build)."""
    gpu_memory_utilization: float = number(0.4, above=0, at_most=1)
    """Share of a GPU's memory the engine may take."""
    omp_threads: int = integer(1, at_least=1, at_most=1024)
    """Threads of the CPU engine; with 1 the same requests give the same bits on every run."""
    request_timeout_s: float = number(3000.0, above=0, at_most=LONGEST_S)
    """Seconds one generate call may take before the engine counts as dead."""


@dataclass
class ValidationConfig:
    samples_per_prompt: int = integer(1, at_least=1)
    max_new_tokens: int | None = integer(None, at_least=1)
    """null: model.rollout.max_new_tokens."""
    kept_rollouts: int = integer(4, at_least=0)
    """Training rollouts whose tokens are saved for the report, at each validation."""
    benchmarks: list[Any] = field(default_factory=list, metadata=ENTRIES)
    """Benchmarks that the run's engine answers before, during and after: names of conf/benchmarks (or files, with their
    path), or dictionaries of a name and the keys that differ: [{name: aime24, samples: 4, max_new_tokens: 4096}].
    Sampling is the benchmark's, prompts and answers share model.encoder_seq_length."""
    benchmark_interval: int | None = integer(None, at_least=0)
    """Steps between them; 0: before the first step and after the last alone; null: trainer.tropd.val_check_interval."""
    score_teacher: bool = flag(False)
    """Have the teacher answer each of their problems once, too; kept in model.teacher.cache_dir."""


@dataclass
class ModelConfig:
    micro_batch_size: int = integer(1, at_least=1)
    """Sequences per forward pass and data-parallel rank, padded to one length; unused with tokens_per_micro_batch."""
    tokens_per_micro_batch: int | None = integer(None, at_least=1)
    """Pack sequences end to end, without padding, in rows of at most this many tokens, one row per forward pass and
    data-parallel rank; null: padded micro-batches of micro_batch_size sequences."""
    recompute: str | None = choice(*RECOMPUTE)
    """The student's activations that are recomputed in the backward pass: selective (the feed-forward part) or full
    (complete layers); null: none."""
    global_batch_size: int = integer(512, at_least=1)
    """Rollouts per step: prompts x model.rollout.samples_per_prompt (the paper: 128 x 4)."""
    encoder_seq_length: int = integer(9216, at_least=2)
    """Longest sequence: prompt, teacher prefix and response."""
    seed: int = integer(1234, at_least=0, at_most=2**32 - 1)
    """Seed of everything random; vLLM seeds numpy with it, which accepts 32 bits."""
    tensor_model_parallel_size: int = integer(1, at_least=1)
    pipeline_model_parallel_size: int = integer(1, at_least=1)
    sequence_parallel: bool = flag(False)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tropd: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, Any] = field(default_factory=dict, metadata=named_sections(TeacherConfig, *TEACHER_KEYS))
    """Further teachers by name, {code: {path: /models/coder, offload: true}}: each with the keys path, precision,
    tensor_model_parallel_size, response_tokens, fp8, fp8_param, fp8_first_last_bf16, offload and url, where they differ
    from model.teacher's. Which prompts have which: model.data.teacher_key, or teacher of a source."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class TropdConfig:
    name: str = file_name("tropd")
    check_only: bool = flag(False)
    """Print the plan (ranks, shapes, memory, tokens per step) and exit."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    pretrained_checkpoint: PretrainedCheckpointConfig = field(default_factory=PretrainedCheckpointConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


ConfigStore.instance().store(name=SCHEMA_NAME, node=TropdConfig)


def host_and_port(key: str, value: str, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``, or with a default port of ``host`` alone; else ConfigError."""
    if (found := split_endpoint(value, default_port)) is None:
        raise ConfigError(key, value, ENDPOINT_WANTED)
    return found


def run_dir(cfg: TropdConfig) -> Path:
    """The directory of a run: ``exp_manager.explicit_log_dir``, else ``exp_dir/name``."""
    if cfg.exp_manager.explicit_log_dir:
        return Path(cfg.exp_manager.explicit_log_dir).absolute()
    assert cfg.exp_manager.exp_dir is not None  # config_checks has seen to it
    return (Path(cfg.exp_manager.exp_dir) / cfg.name).absolute()


def teacher_named(model: ModelConfig, name: str) -> TeacherConfig:
    """The section of a teacher; ``default`` is model.teacher itself."""
    if name == DEFAULT_TEACHER:
        return model.teacher
    # The default one's place and name among its servers, and whether it follows, are its own.
    apart = {"follow_steps": None, "url": None, "server": replace(model.teacher.server, model=None)}
    return replace(model.teacher, **{**apart, **model.teachers[name]})


def loaded_as(model: ModelConfig, name: str, precision: str) -> tuple[object, ...]:
    """Equal for names of teachers that are one in memory; ``precision`` is the run's. One that follows the student is
    nobody else's."""
    t = teacher_named(model, name)
    fp8 = (t.fp8, t.fp8_param, t.fp8_first_last_bf16) if t.fp8 else ()
    split = t.tensor_model_parallel_size or model.tensor_model_parallel_size
    return (Path(t.path).resolve(), split, t.offload, t.precision or precision, t.follow_steps, *fp8, *t.urls)


def with_teacher(cfg: TropdConfig, name: str) -> TropdConfig:
    """The configuration of a run whose one teacher is the one of this name."""
    return replace(cfg, model=replace(cfg.model, teacher=teacher_named(cfg.model, name)))


@contextmanager
def about_teacher(name: str) -> Iterator[None]:
    """Within it, what is wrong with model.teacher is said of the teacher of this name."""
    try:
        yield
    except ConfigError as error:
        own = error.key.removeprefix("model.teacher.")
        if name == DEFAULT_TEACHER or own == error.key or own not in TEACHER_KEYS:
            raise
        remedy = re.sub(rf"model\.teacher\.({'|'.join(TEACHER_KEYS)})\b", rf"model.teachers.{name}.\1", error.remedy)
        raise ConfigError(f"model.teachers.{name}.{own}", error.value, remedy) from error


def guided(cfg: TropdConfig) -> bool:
    """Whether rollouts begin with teacher prefixes."""
    t = cfg.model.tropd
    imitated = t.guidance_weight is not None or "guidance_weight" in t.params or t.objective in IMITATING
    return t.guidance.max_prefix_tokens > 0 and (imitated if t.guidance.enabled is None else t.guidance.enabled)


def anneal_steps(cfg: TropdConfig) -> int:
    """Steps over which teacher prefixes anneal to nothing."""
    guidance = cfg.model.tropd.guidance
    return guidance.anneal_steps or max(1, round(guidance.anneal_fraction * cfg.trainer.tropd.max_steps))


def schema_fields(node: Any = TropdConfig, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every key of the schema, dotted (``model.optim.lr``), sections included, with its field."""
    for f in fields(node):
        yield prefix + f.name, f
        if is_dataclass(f.default_factory):
            yield from schema_fields(f.default_factory, f"{prefix}{f.name}.")


def schema_keys() -> Iterator[str]:
    """Every key of the schema, dotted. A free-form dictionary appears as ``key.*``, too."""
    for key, f in schema_fields():
        yield key
        if f.default_factory is dict:
            yield f"{key}.*"
