"""Off-policy guidance (TrOPD, arXiv 2606.01249): the teacher generates a response's first tokens, the student the rest.

The longest prefix is annealed by a cosine to nothing; how a length is drawn is not stated: ``prefix_draw`` offers both.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nemo_tropd.config import TropdConfig, anneal_steps, guided, teacher_named
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.data import Prompt, PromptSplit
from nemo_tropd.rollout.engine import RolloutRequest
from nemo_tropd.training.teacher_responses import Responses, TeacherResponse

PrefixDraw = Literal["uniform", "cap"]
# The gate's draws use word 3 of the Philox counter at 0; the prefix lengths of the same (seed, step, sequence) at 1.
_STREAM = 1


def max_prefix_length(step: int, *, total_steps: int, longest: int) -> int:
    """Whole tokens of L_max(step) = L (1 + cos(pi step / total)) / 2: ``longest`` at step 0, exactly 0 at the end."""
    if step >= total_steps:
        return 0
    return math.floor(longest * (1.0 + math.cos(math.pi * step / total_steps)) / 2.0)


def draw_prefix_length(limit: int, *, draw: PrefixDraw, seed: int, step: int, sequence_id: int) -> int:
    """``limit`` itself for ``cap``; for ``uniform`` a length in 0 .. limit, a function of the arguments alone."""
    if draw == "cap" or limit <= 0:
        return max(limit, 0)
    mask = (1 << 64) - 1
    # As arrays: numpy takes lists of large integers through float64 and drops their low bits.
    key = np.array([seed & mask, step & mask], dtype=np.uint64)
    stream = np.random.Philox(key=key, counter=np.array([0, 0, sequence_id & mask, _STREAM], dtype=np.uint64))
    uniform = int(stream.random_raw() >> np.uint64(11)) * 2.0**-53
    return int(uniform * (limit + 1))


def request_seed(run_seed: int, step: int, prompt_index: int, sample: int) -> int:
    """A 63-bit seed that depends on its four arguments alone, so that a resumed run samples what it would have."""
    text = f"{run_seed}/{step}/{prompt_index}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Guidance:
    """Plans a step's requests; with ``longest`` (L, the longest prefix at step 0, in tokens) 0 or no ``responses``,
    ordinary rollouts. ``max_new_tokens`` bounds prefix and continuation together."""

    seed: int
    total_steps: int
    max_new_tokens: int
    samples_per_prompt: int = 1
    longest: int = 0
    prefix_draw: PrefixDraw = "uniform"
    responses: Responses | None = None

    def __post_init__(self) -> None:
        if self.prefix_draw not in ("uniform", "cap"):
            raise ValueError(f"prefix_draw is {self.prefix_draw!r}; it must be 'uniform' or 'cap'")
        if self.longest < 0 or min(self.total_steps, self.max_new_tokens, self.samples_per_prompt) < 1:
            raise ValueError(
                "total_steps, max_new_tokens and samples_per_prompt must be at least 1 and the longest prefix at least "
                f"0; they are {self.total_steps}, {self.max_new_tokens}, {self.samples_per_prompt}, {self.longest}"
            )

    def plan(
        self, prompts: Sequence[Prompt], step: int, *, prompt_indices: Sequence[int] | None = None
    ) -> list[RolloutRequest]:
        """``samples_per_prompt`` requests for each prompt of the step, prompt by prompt. ``prompt_indices``: the
        prompts' places in the data (default: in the list). Sample s of the i-th prompt has sequence_id i *
        samples_per_prompt + s. LookupError if a prompt's teacher response is wanted and not there."""
        indices = range(len(prompts)) if prompt_indices is None else prompt_indices
        if len(indices) != len(prompts):
            raise ValueError(f"there are {len(prompts)} prompts but {len(indices)} prompt indices")
        annealed = max_prefix_length(step, total_steps=self.total_steps, longest=self.longest)
        # The student has at least one token to generate.
        longest = min(annealed, self.max_new_tokens - 1) if self.responses is not None else 0
        requests = []
        for i, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
            response = (
                self.responses[prompt.teacher].lookup(prompt.teachers_ids) if self.responses and longest else None
            )
            for sample in range(self.samples_per_prompt):
                sequence_id = i * self.samples_per_prompt + sample
                prefix = self._prefix(response, longest, step, sequence_id)
                requests.append(
                    RolloutRequest(
                        prompt_ids=list(prompt.token_ids),
                        prefix_ids=prefix,
                        seed=request_seed(self.seed, step, index, sequence_id),
                        sequence_id=sequence_id,
                        prompt_index=index,
                        max_new_tokens=self.max_new_tokens - len(prefix),
                    )
                )
        return requests

    def _prefix(self, response: TeacherResponse | None, longest: int, step: int, sequence_id: int) -> list[int]:
        """The prefix never holds the end of sequence."""
        if response is None:
            return []
        usable = len(response.response_ids) - int(response.finished)
        limit = min(longest, usable)
        length = draw_prefix_length(limit, draw=self.prefix_draw, seed=self.seed, step=step, sequence_id=sequence_id)
        return response.response_ids[:length]


def make_guidance(cfg: TropdConfig, responses: Responses | None) -> Guidance:
    """The planner of a run's requests; with guidance off it plans ordinary rollouts."""
    guidance = cfg.model.tropd.guidance
    return Guidance(
        seed=cfg.model.seed,
        total_steps=anneal_steps(cfg),
        max_new_tokens=cfg.model.rollout.max_new_tokens,
        samples_per_prompt=cfg.model.rollout.samples_per_prompt,
        longest=guidance.max_prefix_tokens if guided(cfg) else 0,
        prefix_draw=guidance.prefix_draw,  # type: ignore[arg-type]
        responses=responses,
    )


def wanted_responses(
    cfg: TropdConfig, prompts: PromptSplit, first_step: int = 0, teacher: str = DEFAULT_TEACHER
) -> dict[tuple[int, ...], int]:
    """Tokens of a teacher's response that a run needs at most, by the prompt that it reads: of a held-out prompt the
    complete response, of a training prompt the longest prefix of the steps, from ``first_step`` on, that use it; in
    order of use."""
    guidance, m = cfg.model.tropd.guidance, cfg.model
    full = teacher_named(m, teacher).response_tokens or m.rollout.max_new_tokens
    wanted = dict.fromkeys((p.teachers_ids for p in prompts.held_out if p.teacher == teacher), full)
    if not guided(cfg):
        return wanted
    order, total = prompts.train.order(m.seed), anneal_steps(cfg)
    every = len({p.teachers_ids for p in prompts.train if p.teacher == teacher} | wanted.keys())
    for step in range(first_step, min(total, cfg.trainer.tropd.max_steps)):
        annealed = max_prefix_length(step, total_steps=total, longest=guidance.max_prefix_tokens)
        # Of a response that goes on, the prefix and one token to be generated fit the student's limit.
        length = min(annealed, m.rollout.max_new_tokens - 1)
        if length <= 0 or len(wanted) == every:  # prefixes get shorter: a prompt's first use needs the longest
            break
        for i in order.batch(step, m.global_batch_size // m.rollout.samples_per_prompt):
            prompt = prompts.train[i]
            if prompt.teacher == teacher:
                wanted[prompt.teachers_ids] = max(length, wanted.get(prompt.teachers_ids, 0))
    return wanted
