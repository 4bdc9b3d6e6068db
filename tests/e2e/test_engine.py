"""vLLM as the rollout engine: its log-probabilities against transformers', refreshes, replays and deaths.

An engine takes a quarter of a minute to start: three are started side by side and shared, and the order of the tests in
this file is the order in which they use them.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_tropd.batch import PLAIN, Rollout, Sampling, TokenBatch
from nemo_tropd.loss.head import score_tokens, teacher_scores
from nemo_tropd.loss.inputs import HeadLayout
from nemo_tropd.parallel.agreement import World
from nemo_tropd.rollout.arrays import Arrays
from nemo_tropd.rollout.collective import RankZeroRollouts
from nemo_tropd.rollout.engine import (
    Abandoned,
    EngineDied,
    EngineError,
    RequestError,
    RolloutRequest,
    WeightStreamError,
)
from nemo_tropd.rollout.vllm.child import VllmEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.training.guidance import request_seed
from nemo_tropd.training.teacher_responses import TeacherResponses, checkpoint_fingerprint
from tests.oracles.sampling import renormalised
from tests.tiny_models import make_tiny

pytestmark = [pytest.mark.timeout(240), pytest.mark.random]
CONTEXT = 96
EOS = 3
SEED = random.randrange(1 << 30)
TEACHER_SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=50)
SAMPLED = Sampling(temperature=0.6, top_p=0.95, top_k=20)  # Qwen3's own
VOCABULARY = 131


def engine_of(model_dir: Path, exchange_dir: Path, **changes: Any) -> VllmEngine:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_seqs": 16,
        "kv_cache_gib": 1 / 32,
    }
    return VllmEngine(
        EngineSettings(model_dir, **(settings | changes)),
        bucket_mib=1,
        exchange_dir=exchange_dir,
        start_timeout_s=150,
        answer_timeout_s=100,
    )


def perturb(model: torch.nn.Module, noise: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * p.std().nan_to_num(0.0) * torch.randn_like(p) if p.ndim > 1 else 0.05 * torch.randn_like(p))


def some_requests(count: int, new_tokens: int = 16, prefix: bool = True) -> list[RolloutRequest]:
    rnd = random.Random(SEED)
    return [
        RolloutRequest(
            prompt_ids=[rnd.randrange(4, 130) for _ in range(rnd.randrange(1, 30))],
            prefix_ids=[rnd.randrange(4, 130) for _ in range(rnd.randrange(1, 9))] if prefix and i % 3 == 0 else [],
            seed=request_seed(SEED, 0, i, 0),
            sequence_id=1000 + i,
            prompt_index=500 + i,
            max_new_tokens=new_tokens if i % 2 else 5,
        )
        for i in range(count)
    ]


@torch.no_grad()
def differences(model: torch.nn.Module, rollouts: Sequence[Rollout], sampling: Sampling = PLAIN) -> list[float]:
    """Of every sampled token: between the engine's log-probability and the one by which transformers' logits would have
    been sampled."""
    found: list[float] = []
    for r in rollouts:
        logits, x = model(torch.tensor([r.token_ids])).logits[0, :, :VOCABULARY].double(), torch.tensor(r.response_ids)
        scores = renormalised(logits[-1 - len(x) : -1], x, torch.zeros_like(x), sampling)
        found += (scores - torch.tensor(r.response_log_probs)).abs().tolist()
    return found


def contents(rollouts: Sequence[Rollout]) -> list[tuple[list[int], list[float]]]:
    return [(r.response_ids, r.response_log_probs) for r in rollouts]


def gone(pids: Sequence[int], within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        left = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not left:
            return True
        time.sleep(0.05)
    return False


class Served:
    """A tiny model's engine, which starts in the background, and the transformers model it should agree with."""

    def __init__(self, folder: Path, family: str, tied: bool, rows: int = VOCABULARY, **settings: Any) -> None:
        # Logits of one nat: no token is near certain and none near impossible, whatever the seed.
        shape: dict[str, Any] = {"layers": 2, "hidden": 128, "head_dim": 32, "spread": 1.0}
        self.model_dir = make_tiny(folder / "model", family, tied=tied, seed=SEED, vocab=rows, **shape)
        self.exchange = folder / "exchange"
        self.exchange.mkdir()
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32).eval()
        self.settings = settings
        self.engine = engine_of(self.model_dir, self.exchange, **settings)
        self.requests = some_requests(9)
        self.last: list[Rollout] = []
        self._failure: list[Exception] = []
        self._starter = threading.Thread(target=self._start)
        self._starter.start()

    def _start(self) -> None:
        try:
            self.engine.start()
        except Exception as error:
            self._failure.append(error)

    def ready(self) -> Served:
        self._starter.join()
        if self._failure:
            raise self._failure[0]
        return self

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()

    def bytes_in(self, bytes_a_number: int) -> int:
        return sum(bytes_a_number * p.numel() for p in self.model.parameters())


@pytest.fixture(scope="module")
def all_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """As under torchrun, whose variables vLLM must not take for its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        made = {
            "tied": Served(tmp_path_factory.mktemp("tied"), "qwen3", tied=True),
            "untied": Served(
                tmp_path_factory.mktemp("untied"),
                "qwen2",
                tied=False,
                rows=VOCABULARY + 9,
                sampling=SAMPLED,
                true_vocab_size=VOCABULARY,
            ),
            "bfloat16": Served(
                tmp_path_factory.mktemp("bfloat16"), "llama3", tied=True, dtype="bfloat16", sampling=TEACHER_SAMPLING
            ),
        }
        try:
            yield made
        finally:
            for served in made.values():
                served._starter.join()
                served.engine.close()


@pytest.fixture
def shared(all_served: dict[str, Served]) -> Served:
    return all_served["tied"].ready()


def test_rollouts_come_in_order_with_the_log_probabilities_of_the_softmax(shared: Served) -> None:
    rollouts = shared.engine.generate(shared.requests)
    for request, rollout in zip(shared.requests, rollouts, strict=True):
        assert (rollout.prompt_ids, rollout.prefix_ids) == (request.prompt_ids, request.prefix_ids)
        assert (rollout.sequence_id, rollout.prompt_index) == (request.sequence_id, request.prompt_index)
        assert rollout.weight_version == 0
        assert EOS not in rollout.response_ids[:-1]
        assert rollout.finished == (rollout.response_ids[-1] == EOS)
        assert rollout.finished or len(rollout.response_ids) == request.max_new_tokens
    assert max(differences(shared.model, rollouts)) < 1e-3
    assert Arrays.of(rollouts).log_probs.dtype == np.float32  # 8 bytes a token, as is said of what travels and is saved
    assert shared.engine.generate([]) == []


def test_the_end_of_sequence_is_kept_where_it_was_sampled(shared: Served) -> None:
    rollouts = shared.engine.generate(some_requests(60, new_tokens=60, prefix=False))
    finished = [r for r in rollouts if r.finished]
    assert finished and all(r.response_ids[-1] == EOS for r in finished)
    assert all(EOS not in r.response_ids for r in rollouts if not r.finished)


@pytest.mark.parametrize("version", [1, 7])
def test_a_refresh_brings_the_trainers_weights_under_their_version(shared: Served, version: int) -> None:
    perturb(shared.model)
    stale = shared.engine.generate(shared.requests)
    assert max(differences(shared.model, stale)) > 0.05  # the check below can fail
    stats = shared.engine.update_weights(shared.model.named_parameters(), version)
    assert stats.bytes == shared.bytes_in(4) and stats.buckets >= 2 and 0 < stats.seconds < 30
    assert list(shared.exchange.iterdir()) == []
    shared.last = shared.engine.generate(shared.requests)
    assert {r.weight_version for r in shared.last} == {version}
    assert max(differences(shared.model, shared.last)) < 1e-3


def test_the_same_list_gives_the_same_bits_and_seeds_matter(shared: Served) -> None:
    shared.engine.generate(some_requests(3, new_tokens=30))  # leaves other prompts in the cache
    assert contents(shared.engine.generate(shared.requests)) == contents(shared.last)
    # Of eight prompts, since a single response may be the end of sequence alone, twice over.
    answers = shared.engine.generate(
        [RolloutRequest([9, 8, 10 + p], [], request_seed(SEED, 0, p, s), s, p, 12) for s in range(4) for p in range(8)]
    )
    assert len({str([r.response_ids for r in answers if r.sequence_id == s]) for s in range(4)}) == 4


def test_a_request_may_have_a_sampling_of_its_own(shared: Served) -> None:
    asked = shared.requests[:4]
    greedy = [replace(r, sampling=Sampling(temperature=0.0), seed=r.seed + more) for r in asked for more in (0, 1)]
    rollouts = shared.engine.generate([*greedy, *asked])
    assert max(differences(shared.model, rollouts[8:])) < 1e-3
    for r in rollouts[:8]:
        with torch.no_grad():
            logits = shared.model(torch.tensor([r.token_ids])).logits[0, -1 - len(r.response_ids) : -1, :VOCABULARY]
        assert logits.argmax(-1).tolist() == r.response_ids


def test_a_bad_request_is_named_and_harms_nothing(shared: Served) -> None:
    too_long = RolloutRequest([5] * 60, [6] * 20, 0, 0, 41, 17)
    with pytest.raises(
        RequestError, match=r"prompt 41: 60 prompt \+ 20 prefix \+ 17 new tokens are 97, .* context of 96"
    ):
        shared.engine.generate([*shared.requests, too_long])
    with pytest.raises(RequestError, match="token id 131 is outside the engine's vocabulary of 131"):
        shared.engine.generate([RolloutRequest([131], [], 0, 0, 0, 4)])
    fits = RolloutRequest([5] * 60, [6] * 20, 0, 0, 41, 16)
    assert len(shared.engine.generate([fits])) == 1
    with pytest.raises(EngineError, match="is running"):
        shared.engine.start()


def test_signals_to_the_trainers_group_do_not_reach_the_engine(shared: Served) -> None:
    pid = shared.engine.process_id
    assert pid is not None and os.getsid(pid) == pid != os.getsid(0)


def kill_later(pid: int, after_s: float) -> threading.Thread:
    def kill() -> None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_killed_while_it_writes_it_is_noticed_within_seconds(shared: Served) -> None:
    pid = shared.engine.process_id
    assert pid is not None
    long = [RolloutRequest([7 + i], [], i, i, i, 90) for i in range(16)] * 40
    killer = kill_later(pid, 0.4)
    began = time.monotonic()
    with pytest.raises(EngineDied, match="exit status -9"):
        shared.engine.generate(long)
    assert 0.3 < time.monotonic() - began < 60 and gone([pid])  # by its end, not by the 100 s an answer may take
    killer.join()
    with pytest.raises(EngineDied, match="not running"):
        shared.engine.generate(shared.requests)


def test_a_dead_engine_is_restarted_once_and_the_fresh_one_replays_to_the_bit(shared: Served) -> None:
    engines: list[VllmEngine] = []

    def make() -> VllmEngine:
        """The engine that died in the test before, then a new one."""
        if not engines:
            shared.engine.start = lambda: None
            engines.append(shared.engine)
        else:
            engines.append(engine_of(shared.model_dir, shared.exchange))
        return engines[-1]

    supervisor = RankZeroRollouts(World(), make, shared.weights, shared.engine.settings.vocab_size)
    try:
        again = supervisor.generate(shared.requests, 7)
        assert supervisor.restarts == 1 and len(engines) == 2
        assert contents(again) == contents(shared.last) and {r.weight_version for r in again} == {7}
        pid = engines[1].process_id
        assert pid is not None
        os.kill(pid, signal.SIGKILL)  # between calls
        began = time.monotonic()
        with pytest.raises(EngineError, match="crashed twice at weight version 7"):
            supervisor.generate(shared.requests, 7)
        assert time.monotonic() - began < 60 and gone([pid]) and len(engines) == 2
    finally:
        supervisor.close()
    assert list(shared.exchange.iterdir()) == []


def test_finished_rollouts_are_told_at_once_and_are_the_same(all_served: dict[str, Served]) -> None:
    """The same bits as without anyone to tell, the short ones first."""
    served = all_served["untied"].ready()
    told, wanted = list[Rollout](), some_requests(12, new_tokens=40)
    rollouts = served.engine.generate(wanted, told.append)
    assert sorted(told, key=lambda r: r.sequence_id) == rollouts == served.engine.generate(wanted)
    lengths = [len(r.response_ids) for r in told]
    assert lengths[0] <= 5 and lengths[-1] == max(lengths) > 5


def test_requests_may_come_while_others_are_generated(all_served: dict[str, Served]) -> None:
    """As from a queue that several engines share. Other sequences beside a request change its last bits at most."""
    served = all_served["untied"].ready()
    wanted = some_requests(24, new_tokens=40)
    left, told = wanted[6:], list[Rollout]()

    def further(wait: bool) -> list[RolloutRequest] | None:
        running = len(wanted) - len(left) - len(told)
        return None if not left else [left.pop(0) for _ in range(min(3, len(left)))] if running < 4 else []

    rollouts, alone = served.engine.generate(wanted[:6], told.append, further), served.engine.generate(wanted)
    assert [r.sequence_id for r in rollouts] == [r.sequence_id for r in alone]
    assert sorted(told, key=lambda r: r.sequence_id) == rollouts
    assert max(differences(served.model, rollouts, SAMPLED)) < 1e-3
    same = [a.response_ids == b.response_ids for a, b in zip(rollouts, alone, strict=True)]
    assert sum(same) >= len(same) - 2


def test_requests_that_nobody_waits_for_are_abandoned(all_served: dict[str, Served]) -> None:
    """vLLM has nothing left of them: the next call has the bits of a fresh one."""
    served = all_served["untied"].ready()
    wanted, told = some_requests(12, new_tokens=40), list[Rollout]()
    fresh = served.engine.generate(wanted)
    for until in (1, 4):
        told.clear()
        with pytest.raises(Abandoned):
            served.engine.generate(wanted, told.append, wanted=lambda until=until: len(told) < until)
        assert until <= len(told) < len(wanted)
        assert served.engine.generate(wanted) == fresh and all(r in fresh for r in told)


@torch.no_grad()
def test_engine_and_trainer_agree_about_what_was_sampled(all_served: dict[str, Served]) -> None:
    """At a temperature, from the top k and the top p of it, with rows in the head that have no token."""
    served = all_served["untied"].ready()
    rollouts = served.engine.generate(some_requests(30))
    assert max(differences(served.model, rollouts, SAMPLED)) < 1e-3
    assert max(differences(served.model, rollouts)) > 0.05  # the check can fail
    batch = TokenBatch.pack(rollouts, pad_id=0, seed=0, step=0)
    tokens, weight = batch.loss_tokens(), served.model.lm_head.weight
    hidden, layout = served.model.model(batch.input_ids).last_hidden_state, HeadLayout(VOCABULARY, sampling=SAMPLED)
    teacher = teacher_scores(hidden, weight, tokens.rows, tokens.token_ids, 1, layout)
    seen = score_tokens(hidden, weight, tokens, teacher, layout)
    gap = (seen.student_log_probs - tokens.behavior_log_probs)[~tokens.guided]
    assert len(gap) > 60 and gap.abs().max() < 1e-3


def test_an_untied_model_with_biases_is_refreshed_whole_or_not_at_all(all_served: dict[str, Served]) -> None:
    served = all_served["untied"].ready()
    with torch.no_grad():
        served.model.lm_head.weight.mul_(-1.0)
    perturb(served.model)
    served.engine.update_weights(served.weights(), 3)
    rollouts = served.engine.generate(served.requests)
    assert max(differences(served.model, rollouts, SAMPLED)) < 1e-3 and {r.weight_version for r in rollouts} == {3}
    pid = served.engine.process_id
    torn = ((name, p) for name, p in served.weights() if "layers.1.mlp.up_proj" not in name)
    with pytest.raises(WeightStreamError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        served.engine.update_weights(torn, 4)
    assert pid is not None and gone([pid]) and served.engine.process_id is None
    assert list(served.exchange.iterdir()) == []


def test_in_bfloat16_it_agrees_loosely_and_writes_the_teachers_responses(
    all_served: dict[str, Served], tmp_path: Path
) -> None:
    served = all_served["bfloat16"].ready()
    perturb(served.model)
    assert served.engine.update_weights(served.weights(), 1).bytes == served.bytes_in(2)
    served.engine.start = lambda: None  # it runs
    responses = TeacherResponses(
        tmp_path,
        teacher=checkpoint_fingerprint(served.model_dir),
        sampling=TEACHER_SAMPLING,
        max_new_tokens=20,
        vocab_size=served.engine.settings.vocab_size,
    )
    prompts = [r.prompt_ids for r in served.requests]
    assert responses.ensure(prompts, lambda: served.engine, batch=4) == len(prompts)
    assert served.engine.process_id is None
    written = [responses.lookup(p) for p in prompts]
    rollouts = [
        Rollout(list(p), [], w.response_ids, w.log_probs, 1, 0, 0, w.finished)
        for p, w in zip(prompts, written, strict=True)
    ]
    assert statistics.median(differences(served.model, rollouts, TEACHER_SAMPLING)) < 0.05


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho libnuma is missing\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    engine = engine_of(make_tiny(tmp_path / "model"), tmp_path)
    with pytest.raises(EngineError, match=r"could not start on .*model.*exit status 3[\s\S]*libnuma is missing"):
        engine.start()
    assert engine.process_id is None
    engine.close()
