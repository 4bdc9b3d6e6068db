"""The part of a run's schema that says who teaches; see nemo_tropd/config.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_tropd.fields import URLS, choice, flag, integer, number, text

# Recipes a teacher can run without gradients; Megatron's fourth, delayed, is refused by name.
FP8_RECIPES = ("tensorwise", "blockwise", "mxfp8")


@dataclass
class AdmissionConfig:
    """How far an FP8 teacher may be from the same teacher in bf16; measured at the start of a run, which exits if a
    bound is passed. Read only with model.teacher.fp8. The defaults are the largest figures of an emulation on
    SmolLM2-135M, rounded up (examples/figures/fp8_teacher.md)."""

    prompts: int = integer(16, at_least=0)
    """Held-out prompts, with the teacher's responses, to measure on; 0 skips the check."""
    top_k_kl: float = number(0.06, at_least=0)
    """Nats per token: KL from bf16 to FP8 over bf16's 64 best tokens and one bucket for all others."""
    gate_flips: float = number(0.07, at_least=0, at_most=1)
    """Share of tokens whose Bernoulli gate falls the other way under the run's own draws."""
    ratio_error: float = number(0.4, at_least=0)
    """Nats: mean |difference| of R = log pi_T - log pi_S."""


@dataclass
class ServerConfig:
    """Read only with model.teacher.url. The servers' bearer token, if they want one, is the environment variable
    NEMO_TROPD_TEACHER_TOKEN of every rank."""

    model: str | None = text(None)
    """The name under which the servers list the teacher; null: they list one model, and its last part is that of
    model.teacher.path."""
    requests: int = integer(16, at_least=1, at_most=1024)
    """Requests in flight of each data-parallel rank, over all servers. An answer takes about 60 bytes for each position
    and candidate, as text, in host memory."""
    timeout_s: float = number(120.0, above=0, at_most=86400)
    """Seconds a request may take; then it is sent again, to another server if there is one."""
    give_up_s: float = number(600.0, above=0, at_most=86400)
    """Seconds of attempts after which the run ends; the same command resumes it from its last checkpoint."""
    check_interval: int = integer(1, at_least=1)
    """Steps between comparisons of each server's answers to a fixed text with those before step 1."""
    noise: float = number(0.05, above=0)
    """Nats: mean |difference| of log-probabilities of the same tokens that counts as the same teacher."""


@dataclass
class TeacherConfig:
    path: str = text(MISSING)
    """The teacher: a Hugging Face checkpoint directory with the student's tokenizer."""
    precision: str | None = choice(None, "32", "bf16")
    """"32" or "bf16"; null: trainer.precision."""
    tensor_model_parallel_size: int | None = integer(None, at_least=1)
    """The teacher's own tensor-parallel degree, without a pipeline; null: split like the student. A divisor or a
    multiple of model.tensor_model_parallel_size."""
    response_tokens: int | None = integer(None, at_least=1)
    """Length limit of the teacher's responses for prefixes and validation; null: model.rollout.max_new_tokens."""
    cache_dir: str | None = text(None)
    """Where teacher responses are kept; null: the user's cache directory."""
    fp8: str | None = choice(None, *FP8_RECIPES)
    """Transformer Engine's FP8 for the teacher's layers: tensorwise or blockwise (Hopper and later), mxfp8 (Blackwell);
    null: none. The head, the embedding and the norms stay in bf16."""
    fp8_param: bool = flag(True)
    """Keep the layers' weights in FP8: half the bytes, and nothing is cast again at each pass. Read only with fp8."""
    fp8_first_last_bf16: int = integer(0, at_least=0)
    """Layers at each end that stay in bf16. Read only with fp8."""
    offload: bool = flag(False)
    """Keep the teacher's weights in host memory (pinned, if there is a GPU) except while it scores."""
    offload_states: bool = flag(False)
    """Exact objectives: keep the teacher's hidden states of a step in host memory (pinned, if there is a GPU) until
    their micro-batch, instead of on the device."""
    score_early: bool = flag(True)
    """Score rollouts that are finished while others are still generated: of a teacher behind servers unless engines are
    colocated, of one on the ranks (single sequences then) if engines have hosts of their own. Not with exact
    objectives, a tensor-parallel degree of the teacher's own, or several offloaded teachers."""
    follow_steps: int | None = integer(None, at_least=1)
    """Before every step whose number is a multiple, model.teacher becomes the student as it is then; its prefixes and
    held-out answers stay those of model.teacher.path. null: it never changes."""
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    url: Any = field(default=None, metadata=URLS)
    """The teacher behind an OpenAI-compatible vLLM server, http://HOST:PORT, or a list of several for load; path then
    gives config.json and tokenizer, and needs no weights. Servers give candidates, not complete distributions: the
    sampled objectives at temperature 1. null: the weights of path, on the ranks."""
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def urls(self) -> list[str]:
        """The addresses of ``url``, without /v1 at the end; none for a teacher on the ranks."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return [url.rstrip("/").removesuffix("/v1").rstrip("/") for url in given]


TEACHER_KEYS = (
    *("path", "precision", "tensor_model_parallel_size", "response_tokens"),
    *("fp8", "fp8_param", "fp8_first_last_bf16", "offload", "url"),
)  # of a section of model.teachers; the others are model.teacher's
DEFAULT_TEACHER = "default"
