"""A task that separates the objectives: twelve digits in, their twelve running sums modulo 10 out.

The teacher has learned the sums. The student has learned a mostly wrong rule (three times in four it subtracts), so
that at most positions its own samples are outliers to the teacher, and on-policy distillation has to unlearn it.
Everything the loss touches is the project's own: head, objectives, random gates, divergences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_tropd import objectives
from nemo_tropd.batch import LossTokens, TeacherScores, TeacherStates, gate_uniforms
from nemo_tropd.loss.divergence import exact_divergences
from nemo_tropd.loss.head import LossOptions, head_loss, score_tokens, sequence_mean_weights, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.loss.teacher import TeacherHead
from nemo_tropd.objectives import Objective

DIGITS = 12
VOCAB, SEPARATOR = 12, 10
LAYOUT = HeadLayout(VOCAB)
PROMPT = DIGITS + 1
TOP_K = 4
BATCH = 64
LEARNING_RATE = 1e-3
EVERY = 20  # steps between two measurements of accuracy
MEASURED = 256  # sequences of one
ANSWER_ROWS = slice(PROMPT - 1, PROMPT - 1 + DIGITS)  # output positions that score the answer

Cache = tuple[Tensor, Tensor]  # keys and values [B, heads, S, H / heads]

# Full TrOPD has teacher prefixes; ``fkl_outlier`` is TrOPD without them.
WITH_PREFIXES = ("tropd", "tropd_aopd", "tropd_exact")
# Besides the plain names: an objective with an option that changes what it does.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "fkl_outlier:threshold": ("fkl_outlier", {"gate": "threshold"}),
    "fkl_outlier:soft": ("fkl_outlier", {"gate": "soft"}),
    "fkl_outlier:exact": ("tropd_exact", {}),
    "tropd:mask": ("tropd", {"outlier": "mask"}),
}
OBJECTIVE_NAMES = (*objectives.OBJECTIVES, *VARIANTS)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        """x [B, S, H]; with the ``past`` keys and values of one sequence, S is 1."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x)), (k, v)


class DigitModel(nn.Module):
    """A causal transformer that gives hidden states; ``head`` [VOCAB, width] is the weight of its output layer."""

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(PROMPT + DIGITS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.randn(VOCAB, width) / math.sqrt(width))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, H]."""
        return self.continued(ids, [None] * len(self.blocks))

    def continued(self, ids: Tensor, cache: list[Cache | None]) -> Tensor:
        """[B, S, H] of ids that follow the ``cache`` (one entry a block), which is extended."""
        start = 0 if cache[0] is None else cache[0][0].size(2)
        states = self.embedding(ids) + self.positions.weight[start : start + ids.size(1)]
        for i, block in enumerate(self.blocks):
            states, cache[i] = block(states, cache[i])
        return self.norm(states)


@dataclass(frozen=True)
class Models:
    """Both models' weights, as they go to another process."""

    teacher: dict[str, Tensor]
    student: dict[str, Tensor]

    def build(self) -> tuple[DigitModel, DigitModel]:
        teacher, student = DigitModel(64), DigitModel(48)
        teacher.load_state_dict(self.teacher)
        student.load_state_dict(self.student)
        return teacher.requires_grad_(False), student


@dataclass(frozen=True)
class Curve:
    """One run's measurements: one value per step, except ``accuracy``, measured at ``accuracy_steps``."""

    objective: str
    seed: int
    gradient_norm: list[float]
    trust: list[float]
    reverse_kl: list[float]
    one_minus_tv: list[float]
    accuracy_steps: list[int]
    accuracy: list[float]

    @classmethod
    def empty(cls, objective: str, seed: int = 0) -> Curve:
        """Before the first step."""
        return cls(objective, seed, [], [], [], [], [], [])


def random_digits(count: int, generator: torch.Generator) -> Tensor:
    """[count, DIGITS] int64, each of 0 to 9."""
    return torch.randint(0, 10, (count, DIGITS), generator=generator)


def running_sums(digits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The correct answer."""
    return digits.cumsum(1) % 10


def wrong_rule(digits: Tensor, generator: torch.Generator) -> Tensor:
    """What the student is taught first: right in a quarter of the sequences, running differences in the others."""
    sign = torch.where(torch.rand(len(digits), 1, generator=generator) < 0.25, 1, -1)
    answer = (digits * sign).cumsum(1) % 10
    answer[:, 0] = digits[:, 0]
    return answer


def sequence(digits: Tensor, answer: Tensor) -> Tensor:
    """Digits, separator and answer in one row: [count, 2 * DIGITS + 1]."""
    return torch.cat([digits, torch.full((len(digits), 1), SEPARATOR), answer], 1)


def prepare(say: Callable[[str, int, int], None] = lambda *_: None, teacher_steps: int = 800) -> Models:
    """Train the teacher on the sums and the student on the wrong rule; about a minute on one core."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    teacher, student = DigitModel(64), DigitModel(48)
    for name, model, rule, steps in (
        ("teacher", teacher, running_sums, teacher_steps),
        ("student", student, wrong_rule, 300),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(steps):
            rate = min(1, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
            optimizer.param_groups[0]["lr"] = 3e-3 * rate
            digits = random_digits(BATCH, generator)
            answer = rule(digits, generator)
            logits = model(sequence(digits, answer)[:, :-1])[:, ANSWER_ROWS] @ model.head.t()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            say(name, step + 1, steps)
    return Models(teacher.state_dict(), student.state_dict())


@torch.no_grad()
def generate(
    model: DigitModel, digits: Tensor, generator: torch.Generator | None, teacher: DigitModel, prefix: Tensor
) -> Tensor:
    """Answers [B, DIGITS]; the teacher generates the first ``prefix`` [B] digits. Greedy without a generator."""
    token = torch.cat([digits, torch.full((len(digits), 1), SEPARATOR)], 1)
    tokens: list[Tensor] = []
    caches: list[list[Cache | None]] = [[None] * len(m.blocks) for m in (model, teacher)]
    guided = int(prefix.max())
    for t in range(DIGITS):
        probabilities = _next_token(model, token, caches[0])
        if t < guided:
            guide = _next_token(teacher, token, caches[1])
            probabilities = torch.where((t < prefix)[:, None], guide, probabilities)
        if generator is None:
            token = probabilities.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(probabilities, 1, generator=generator)
        tokens.append(token)
    return torch.cat(tokens, 1)


def _next_token(model: DigitModel, ids: Tensor, cache: list[Cache | None]) -> Tensor:
    return (model.continued(ids, cache)[:, -1] @ model.head.t()).softmax(-1)


def loss_tokens(answer: Tensor, prefix: Tensor, step: int, seed: int) -> LossTokens:
    """Every token of every answer, with the random numbers that a training run would use."""
    count = len(answer)
    positions = torch.arange(PROMPT - 1, PROMPT - 1 + DIGITS)
    rows = torch.arange(count)[:, None] * (PROMPT + DIGITS - 1) + positions
    uniforms = torch.stack([gate_uniforms(seed, step, i, PROMPT - 1 + DIGITS)[ANSWER_ROWS] for i in range(count)])
    guided = torch.arange(DIGITS) < prefix[:, None]
    return LossTokens(
        rows=rows.flatten(),
        token_ids=answer.flatten(),
        guided=guided.flatten(),
        uniforms=uniforms.flatten(),
        behavior_log_probs=torch.full((count * DIGITS,), math.nan),
        sequence=torch.arange(count).repeat_interleave(DIGITS),
    )


def distill(name: str, seed: int, steps: int, models: Models) -> Curve:
    """Train the student with one objective; on-policy, one Adam step a batch, no gradient clipping."""
    base, params = VARIANTS.get(name, (name, {}))
    if base == "reopold_2stage":
        params = {"switch_step": steps // 2}
    objective = objectives.build(base, **params)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher, student = models.build()
    _, reference = models.build()
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    curve = Curve.empty(name, seed)
    for step in range(steps):
        if step % EVERY == 0:
            _measure_accuracy(curve, step, student, teacher)
        digits = random_digits(BATCH, generator)
        longest = round(DIGITS * 0.5 * (1 + math.cos(math.pi * step / steps))) if name in WITH_PREFIXES else 0
        prefix = torch.randint(0, longest + 1, (BATCH,), generator=generator)
        answer = generate(student, digits, generator, teacher, prefix)
        tokens = loss_tokens(answer, prefix, step, seed)
        distill_step(
            objective.at_step(step), sequence(digits, answer)[:, :-1], tokens, (student, teacher, reference), curve
        )
        optimizer.step()
        optimizer.zero_grad()
    _measure_accuracy(curve, steps, student, teacher)
    return curve


def distill_step(
    objective: Objective,
    ids: Tensor,
    tokens: LossTokens,
    models: tuple[DigitModel, DigitModel, DigitModel],
    curve: Curve,
) -> None:
    """Teacher scores, a first pass if one is needed, loss and gradients; appends this step's measurements."""
    student, teacher, reference = models
    with torch.no_grad():
        teacher_hidden = teacher(ids)
        scores = teacher_scores(
            teacher_hidden, teacher.head, tokens.rows, tokens.token_ids, TOP_K, LAYOUT,
            entropy=objective.needs_teacher_entropy,
        )  # fmt: skip
        anchor = None
        if objective.needs_reference:
            anchor = teacher_scores(reference(ids), reference.head, tokens.rows, tokens.token_ids, 1, LAYOUT).log_probs
    hidden = student(ids)
    if objective.needs_first_pass:
        seen = score_tokens(hidden, student.head, tokens, scores, LAYOUT, entropy=True, reference_log_probs=anchor)
        objective = objective.bind(objective.statistic(seen))
    weights = None
    if objective.denominator == "sequences":
        weights = sequence_mean_weights(tokens, len(tokens), BATCH)
    beside: TeacherScores | TeacherHead = scores
    if objective.needs_distributions:
        beside = TeacherHead(TeacherStates(teacher_hidden.flatten(0, 1)[tokens.rows]), teacher.head, TOP_K)
    result = head_loss(
        hidden, student.head, tokens, beside, objective, LAYOUT, scale=1 / len(tokens),
        options=LossOptions(token_weights=weights, reference_log_probs=anchor),
    )  # fmt: skip
    result.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    exact = exact_divergences(hidden, student.head, teacher_hidden, teacher.head, tokens.rows, LAYOUT)
    curve.gradient_norm.append(float(norm))
    curve.trust.append(float(result.metrics["trust"] / result.metrics["tokens"].clamp(min=1)))
    curve.reverse_kl.append(float(exact["reverse_kl"].mean()))
    curve.one_minus_tv.append(float(exact["one_minus_tv"].mean()))


def _measure_accuracy(curve: Curve, step: int, student: DigitModel, teacher: DigitModel) -> None:
    digits = random_digits(MEASURED, torch.Generator().manual_seed(7))
    answer = generate(student, digits, None, teacher, torch.zeros(MEASURED))
    curve.accuracy_steps.append(step)
    curve.accuracy.append(float((answer == running_sums(digits)).float().mean()))
