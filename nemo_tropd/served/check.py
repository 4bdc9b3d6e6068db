"""The self-test of a teacher's servers before step 1, and the fingerprint by which another teacher is noticed."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from nemo_tropd.config import ConfigError, TeacherConfig
from nemo_tropd.files import write_json
from nemo_tropd.served.answers import Scores, Vocabulary, scoring
from nemo_tropd.served.client import BadAnswer, Choice, Question, RefusedError, ServerError, Servers

REPEATS = 4
URL, NOISE = "model.teacher.url", "model.teacher.server.noise"
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1905, Albert Einstein published four papers that changed physics: "
    "on the photoelectric effect, on Brownian motion, on special relativity and on the equivalence of mass and energy. "
    "def mean(xs): return sum(xs) / len(xs)\nIf 3x + 7 = 22, then x = 5, since 22 - 7 = 15 and 15 / 3 = 5."
)


@dataclass(frozen=True)
class Fingerprint:
    """A teacher's log-probabilities of a fixed text's tokens but the first, nats."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]

    def distance(self, other: "Fingerprint") -> float:
        """Mean |difference|, nats a token; infinite for another text."""
        same = self.ids == other.ids and len(self.log_probs) == len(other.log_probs)
        return distance(self.log_probs, other.log_probs) if same else float("inf")

    @property
    def digest(self) -> str:
        """Names it in a file."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class FixedText:
    """What ``Servers`` compares: the question, and the answer before step 1. ``noise``: the bound, nats."""

    known: Fingerprint
    noise: float
    question: Question[Scores]

    @classmethod
    def of(cls, known: Fingerprint, noise: float, vocabulary: Vocabulary) -> "FixedText":
        """The text that ``known`` is of."""
        return cls(known, noise, scoring(known.ids, 1, 1, vocabulary.raw))

    def check(self, url: str, answer: Scores) -> None:
        """ServerError if the answer is another teacher's."""
        far = distance(self.known.log_probs, answer.log_probs)
        if not far <= self.noise:
            raise ServerError(
                f"{url} has another teacher than before step 1: its log-probabilities of a fixed text are "
                f"{far:.4g} nats a token away, and {NOISE} = {self.noise:g}. It was started again with other weights, "
                "dtype or options: serve the run's teacher again and rerun the command, which resumes from the last "
                "checkpoint"
            )


def distance(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Mean |difference|, nats a token."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


def self_test(
    servers: Servers, teacher: TeacherConfig, tokenizer: Any, vocabulary: Vocabulary, *, top_k: int, longest: int
) -> Fingerprint:
    """Try each server and print what was found; the fingerprint. ``servers`` then know the model's name and the
    fingerprint. ConfigError, with the flag of ``vllm serve`` that helps, for a server that will not do."""
    servers.model = _model(servers, teacher, longest)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)[: longest - 1]
    found = [_try(servers, url, ids, tokenizer, vocabulary, top_k, teacher.server.noise) for url in servers.urls]
    for (one, first), (other, second) in combinations(zip(servers.urls, found, strict=True), 2):
        if not (far := first.distance(second)) <= teacher.server.noise:
            both = (
                f"it and {one} are {far:.4g} nats a token apart on the same tokens ({NOISE} = {teacher.server.noise:g})"
            )
            raise ConfigError(URL, other, f"{both}: serve the same checkpoint with the same --dtype on all")
    mean = np.mean([one.log_probs for one in found], axis=0)
    known = Fingerprint(tuple(ids), tuple(mean.tolist()))
    servers.fixed = FixedText.of(known, teacher.server.noise, vocabulary)
    return known


def _model(servers: Servers, teacher: TeacherConfig, longest: int) -> str:
    """The name under which all servers serve the teacher. ConfigError if there is none."""
    name, wanted = "", teacher.server.model
    for url in servers.urls:
        cards = [card for card in servers.models(url) if card.parent is None or card.id == wanted]
        known = ", ".join(card.id for card in cards) or "no model"
        mine = [card for card in cards if card.id == (wanted or name or card.id)]
        key, value = ("model.teacher.server.model", wanted) if wanted else (URL, url)
        if len(mine) != 1:
            raise ConfigError(key, value, f"{url} serves {known}: set model.teacher.server.model to the teacher's name")
        card, last = mine[0], Path(teacher.path).resolve().name.lower()
        if not wanted and last not in {Path(n).name.lower() for n in (card.id, card.root or "")}:
            other = f"serves {card.id} (of {card.root}), and model.teacher.path is {teacher.path}: serve that one, or, "
            same = f"if it is that one, set model.teacher.server.model={card.id}, or --served-model-name {last} there"
            raise ConfigError(URL, url, other + same)
        if card.max_model_len is not None and card.max_model_len <= longest:
            short = f"takes {card.max_model_len} tokens, and model.encoder_seq_length + 1 = {longest + 1} are needed"
            raise ConfigError(URL, url, f"{short}: serve it with --max-model-len {longest + 1}")
        name = card.id
    return name


def _try(
    servers: Servers, url: str, ids: list[int], tokenizer: Any, vocabulary: Vocabulary, top_k: int, noise: float
) -> Fingerprint:
    """A server's fingerprint, after all checks of its answers."""
    _vocabulary(servers, url, vocabulary.rows, len(tokenizer))
    asked, raw = vocabulary.asked(top_k), vocabulary.raw
    again = scoring(ids, 1, asked, raw)
    try:
        first = servers.ask([again], url)[0]
    except RefusedError as error:
        flags = f"serve it with --max-logprobs {asked} (or lower model.tropd.top_k)"
        raise ConfigError("model.tropd.top_k", top_k, f"{error}; {flags}, if that is what it refuses") from error
    _texts(servers, url, tokenizer, len(ids))
    half = max(2, len(ids) // 2)
    # Together, so that they share the server's batches with others.
    *repeats, prefix, shifted = servers.ask(
        [*[again] * REPEATS, scoring(ids[:half], 1, asked, raw), scoring(ids[1:], 1, asked, raw)], url
    )
    several = np.stack([s.log_probs for s in (first, *repeats)]).astype(np.float64)
    mean = several.mean(0)
    spread, largest = float(np.abs(several - mean).mean(1).max()), float(np.ptp(several, axis=0).max())
    cut, moved = distance(prefix.log_probs, mean[: half - 1]), distance(shifted.log_probs, mean[1:])
    print(
        f"teacher's server {url} serves {servers.model}: the same {len(ids)} tokens {len(several)} times differ by "
        f"{spread:.2g} nats a token (at most {largest:.2g}), their first half alone by {cut:.2g}, without the first "
        f"token by {moved:.2g}; {asked} candidates a token, {vocabulary.rows} ids, tokens of texts as ours",
        flush=True,
    )
    steady = "serve it with --dtype bfloat16 or float32 instead of a quantised one, set VLLM_BATCH_INVARIANT=1 there"
    for what, value in (("repeated", spread), ("their first half alone", cut)):
        if not value <= noise:
            why = f"the same tokens {what} differ by {value:.4g} nats a token on {url}: {steady}, or raise the bound"
            raise ConfigError(NOISE, noise, why)
    if moved <= spread:
        why = "log-probabilities do not depend on the tokens before them: it is no language model's own server"
        raise ConfigError(URL, url, why)
    return Fingerprint(tuple(ids), tuple(mean.tolist()))


def _vocabulary(servers: Servers, url: str, rows: int, tokens: int) -> None:
    """ConfigError unless the server takes the head's last id, and none that neither head nor tokenizer has."""

    def takes(token: int) -> bool:
        question = scoring([token, token], 1, 1, Vocabulary(token + 1, token + 1))
        try:
            servers.ask([Question(question.body, lambda choice: None)], url)
        except RefusedError:
            return False
        return True

    if (more := takes(max(rows, tokens))) or not takes(rows - 1):
        why = f"its model has {'more' if more else 'fewer'} than the {rows} ids of model.teacher.path"
        raise ConfigError(URL, url, f"{why}: serve that checkpoint")


def _texts(servers: Servers, url: str, tokenizer: Any, characters: int) -> None:
    """ConfigError unless the server's tokenizer gives the ids that ours does."""

    def read(choice: Choice) -> list[int]:
        if not choice.prompt_token_ids:
            raise BadAnswer("it has no prompt_token_ids")
        return choice.prompt_token_ids

    text = TEXT[:characters]  # of ASCII characters, so at most as many tokens
    body = {"prompt": text, "max_tokens": 1, "add_special_tokens": False, "return_token_ids": True}
    found, ours = servers.ask([Question(body, read)], url)[0], tokenizer.encode(text, add_special_tokens=False)
    if found != ours:
        at = next((i for i, (a, b) in enumerate(zip(found, ours, strict=False)) if a != b), min(len(found), len(ours)))
        seen = f"token {at} of a text begins {found[at : at + 4]}, and with model.teacher.path {ours[at : at + 4]}"
        raise ConfigError(URL, url, f"its tokenizer is another: {seen}; serve it with --tokenizer of that path")


def remembered(found: Fingerprint, memory: Path, noise: float) -> Fingerprint:
    """The fingerprint in the file ``memory`` that is this teacher's, else ``found``, which is then kept there: files
    are named by it, and no server answers twice with the same bits."""
    known: list[Fingerprint] = []
    with suppress(OSError, msgspec.MsgspecError, KeyError):  # not there yet, or damaged
        known = msgspec.json.decode(memory.read_bytes(), type=dict[str, list[Fingerprint]])["teachers"]
    for one in known:
        if one.distance(found) <= noise:
            return one
    with suppress(OSError):  # no room: it has no name the next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {"teachers": [asdict(one) for one in (*known, found)]})
    return found
