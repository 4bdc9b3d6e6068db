"""The teacher's own answers to the prompts, written by an engine before training and kept on disk.

A folder for each fingerprint of (teacher checkpoint, sampling, length, seed) holds JSON-lines shards. A shard appears
whole or not at all (temporary name, then rename), every line carries a digest of itself, and later shards win; so an
interrupted run keeps what it has, and a damaged line costs one response.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_tropd.batch import Rollout
from nemo_tropd.config import TropdConfig
from nemo_tropd.files import complete_file, default_cache_dir, remove_stale
from nemo_tropd.parallel.agreement import Ranks, on_rank_zero
from nemo_tropd.rollout.engine import EngineDied, RolloutEngine, RolloutRequest, Sampling
from nemo_tropd.rollout.placement import EngineFactory, sampling_of

_log = logging.getLogger(__name__)
_FORMAT = 1
_BATCH = 64  # prompts of a shard: what an interrupted run may lose
_SAMPLE_BYTES = 1 << 20
_SAMPLES = 16
_CONFIG_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class TeacherResponse:
    """What the teacher wrote after a prompt, with its log-probabilities (nats, unscaled softmax)."""

    response_ids: list[int]
    log_probs: list[float]
    finished: bool  # the last token ends the sequence


def checkpoint_fingerprint(model_dir: str | Path) -> str:
    """A digest of a checkpoint: config files, and size, start and evenly spaced samples of every weight file.

    Independent of where the checkpoint lies and when it was copied; a second or so even for large ones.
    """
    folder = Path(model_dir)
    digest = hashlib.sha256()
    for name in _CONFIG_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file, so it cannot be told from other checkpoints")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as weights:
            for start in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
                weights.seek(start)
                digest.update(weights.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """Names a prompt by its token ids."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()[:32]


class TeacherResponses:
    """One response a prompt, read from disk at the start and written where it is missing."""

    def __init__(
        self, cache_dir: str | Path, *, teacher: str, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> None:
        """``teacher`` is the checkpoint's fingerprint. What other settings wrote in ``cache_dir`` is left alone."""
        self._identity: dict[str, Any] = {
            "format": _FORMAT,
            "teacher": teacher,
            "sampling": asdict(sampling),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }
        text = json.dumps(self._identity, sort_keys=True)
        self.folder = Path(cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._responses: dict[str, TeacherResponse] = {}
        self._damaged: dict[Path, list[bytes]] = {}  # shards with damaged lines: the lines that are whole
        self._load()

    def __len__(self) -> int:
        return len(self._responses)

    def __contains__(self, prompt_ids: Sequence[int]) -> bool:
        return prompt_key(prompt_ids) in self._responses

    def lookup(self, prompt_ids: Sequence[int]) -> TeacherResponse:
        """The teacher's response to a prompt. Raises LookupError when ``ensure`` has not been given that prompt."""
        response = self._responses.get(prompt_key(prompt_ids))
        if response is None:
            raise LookupError(
                f"no teacher response in {self.folder} for the prompt of {len(prompt_ids)} tokens that begins with "
                f"{list(prompt_ids[:8])}; call ensure() with every training prompt before training"
            )
        return response

    def rollouts(self, prompts: Iterable[Sequence[int]]) -> list[Rollout]:
        """The responses as rollouts that are all prefix: every token is scored, none is the student's.

        Raises LookupError as ``lookup`` does.
        """
        return [
            Rollout(
                prompt_ids=list(ids),
                prefix_ids=self.lookup(ids).response_ids,
                response_ids=[],
                response_log_probs=[],
                weight_version=0,
                sequence_id=i,
                prompt_index=i,
                finished=True,
            )
            for i, ids in enumerate(prompts)
        ]

    def ensure(
        self,
        prompts: Iterable[Sequence[int]],
        engine_factory: Callable[[], RolloutEngine],
        *,
        batch: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write the responses that are missing, ``batch`` prompts at a time; returns how many.

        An engine is made and started only if something is missing, and closed at the end; one that dies is replaced
        once. What has been written stays when it fails. ``progress`` is told (written, missing) after each batch.
        """
        requests = {key: self._request(i, key, ids) for i, ids in enumerate(prompts) if (key := prompt_key(ids))}
        missing = [key for key in requests if key not in self._responses]
        if not missing:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_damaged_lines()
        engine = engine_factory()
        replaced = False
        try:
            engine.start()
            for start in range(0, len(missing), batch):
                keys = missing[start : start + batch]
                part = [requests[key] for key in keys]
                try:
                    rollouts = engine.generate(part)
                except EngineDied:
                    if replaced:
                        raise
                    replaced = True
                    engine.close()
                    engine = engine_factory()
                    engine.start()
                    rollouts = engine.generate(part)
                self._add_shard(keys, rollouts)
                if progress is not None:
                    progress(min(start + batch, len(missing)), len(missing))
        finally:
            engine.close()
        return len(missing)

    def _request(self, index: int, key: str, ids: Sequence[int]) -> RolloutRequest:
        """Seeded by the prompt itself: the order in which responses are asked for leaves no trace."""
        seed = int.from_bytes(hashlib.blake2b(f"{self._seed}/{key}".encode(), digest_size=8).digest(), "little") >> 1
        return RolloutRequest(list(ids), [], seed, index, index, self._max_new_tokens)

    def _add_shard(self, keys: Sequence[str], rollouts: Sequence[Rollout]) -> None:
        written = {
            key: TeacherResponse(r.response_ids, r.response_log_probs, r.finished)
            for key, r in zip(keys, rollouts, strict=True)
        }
        number = 1 + max((int(file.stem.split("-")[1]) for file in self._shards()), default=-1)
        _write_whole(self.folder / f"responses-{number:06d}.jsonl", [_line(k, r).encode() for k, r in written.items()])
        self._responses.update(written)

    def _drop_damaged_lines(self) -> None:
        for shard, whole_lines in self._damaged.items():
            _write_whole(shard, whole_lines)
        self._damaged.clear()

    def _shards(self) -> list[Path]:
        return sorted(
            file for file in self.folder.glob("responses-*.jsonl") if re.fullmatch(r"responses-\d+", file.stem)
        )

    def _load(self) -> None:
        for shard in self._shards():
            lines = shard.read_bytes().splitlines()
            entries = [_parse(line) for line in lines]
            for number, entry in enumerate(entries, start=1):
                if entry is None:
                    _log.warning(
                        "%s, line %d is damaged: the teacher's response on it will be written anew", shard, number
                    )
                else:
                    self._responses[entry[0]] = entry[1]
            if None in entries:
                self._damaged[shard] = [line for line, entry in zip(lines, entries, strict=True) if entry is not None]
        remove_stale(self.folder)


def generate_teacher_responses(
    cfg: TropdConfig, prompts: Sequence[Sequence[int]], ranks: Ranks, engines: EngineFactory
) -> TeacherResponses | None:
    """Have the teacher generate the responses to ``prompts`` that the cache lacks (collective).

    Happens before any model is built, so that the teacher's engine has the machine to itself. Rank 0 gets the
    responses, the other ranks None.
    """
    generated: list[TeacherResponses] = []

    def generate() -> None:
        responses = TeacherResponses(
            Path(cfg.model.teacher.cache_dir or default_cache_dir() / "teacher_responses"),
            teacher=checkpoint_fingerprint(cfg.model.teacher.path),
            sampling=sampling_of(cfg),
            max_new_tokens=cfg.model.teacher.response_tokens or cfg.model.rollout.max_new_tokens,
            seed=cfg.model.seed,
        )
        missing = sum(ids not in responses for ids in prompts)
        if missing:
            print(f"the teacher generates up to {missing} responses into {responses.folder}", flush=True)
        responses.ensure(
            prompts,
            lambda: engines.teacher(cfg),
            batch=_BATCH,
            progress=lambda done, of: print(f"teacher responses {done}/{of}", flush=True),
        )
        generated.append(responses)

    on_rank_zero(ranks, generate, may_stop=True)
    return generated[0] if generated else None


def _write_whole(target: Path, lines: Sequence[bytes]) -> None:
    """The file appears with all of its lines, or stays as it was."""
    with complete_file(target) as temporary, temporary.open("wb") as file:
        file.writelines(line + b"\n" for line in lines)


def _line(key: str, response: TeacherResponse) -> str:
    body = {"key": key, **asdict(response)}
    return json.dumps({**body, "digest": _digest(body)})


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def _parse(line: bytes) -> tuple[str, TeacherResponse] | None:
    """The entry on a line; None when the line is not one whole, unchanged entry."""
    try:
        body = json.loads(line)
        digest = body.pop("digest")
        if digest != _digest(body):
            return None
        return body["key"], TeacherResponse(body["response_ids"], body["log_probs"], body["finished"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
