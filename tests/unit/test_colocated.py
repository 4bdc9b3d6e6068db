"""The engine in the trainer's process, over a double of ``vllm.LLM`` that refuses what vLLM would not survive."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_tropd.config import ConfigError
from nemo_tropd.parallel.signals import Stopped
from nemo_tropd.rollout import collective
from nemo_tropd.rollout.collective import VOTE_STEPS, EveryRankRollouts
from nemo_tropd.rollout.engine import (
    Abandoned,
    EngineError,
    RefreshStats,
    RequestError,
    RolloutRequest,
    WeightStreamError,
)
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.in_process import ColocatedEngine, environment
from nemo_tropd.rollout.vllm.server import EngineServer
from nemo_tropd.rollout.vllm.settings import EngineSettings
from tests.doubles import ReplayEngine
from tests.tiny_models import make_tiny
from tests.unit.test_parts_of_answers import Engine

pytestmark = pytest.mark.random

EOS, ROWS, TOKENS = 3, 131, 120


class SteppingEngine:
    """vLLM's engine: every step has outputs, some of which may be finished."""

    def __init__(self, engine_core: Any) -> None:
        self.engine_core, self.queue = engine_core, list[Any]()

    def step(self) -> list[Any]:
        some = [self.queue.pop() for _ in range(random.randint(0, len(self.queue)))]
        return [*some, *(SimpleNamespace(request_id=o.request_id, finished=False) for o in self.queue)]

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        """By the numbers that they were given; those that are finished are passed over."""
        assert not internal and all(isinstance(number, str) for number in request_ids)
        self.queue = [o for o in self.queue if o.request_id not in request_ids]


class RecordingLLM:
    """vLLM's methods by name and signature (0.24.0, entrypoints/llm.py); keeps the order of calls and its memory.
    tests/contract/test_vllm.py reads what it enforces in vLLM's source."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.calls = arguments, [("start", os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"))]
        self.start_method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        self.awake = {"weights", "kv_cache"}
        self.buffers_saved = False
        self.weights: dict[str, Tensor] = {}
        self.prefixes_of: int | None = None  # the weights that cached prefixes belong to
        self.loads = self.unfinished = 0
        self.seen: list[Any] = []
        self.llm_engine = SteppingEngine(SimpleNamespace(shutdown=self._shutdown))
        self.request_counter = SimpleNamespace(counter=random.randrange(99))

    def _shutdown(self) -> None:
        """As vLLM's: it unmaps all its memory, and ends the default process group."""
        assert self.awake == {"weights", "kv_cache"}, "unmapping what is not mapped"
        self.calls.append(("shutdown",))
        torch.distributed.destroy_process_group()

    def wake_up(self, tags: list[str] | None = None) -> None:
        woken = set(tags or ("weights", "kv_cache"))
        assert not woken & self.awake, f"{woken} is mapped already"
        self.awake |= woken
        if self.buffers_saved:  # whatever the tags are
            assert "weights" in self.awake, "CUDA_ERROR_ILLEGAL_ADDRESS: buffers copied into unmapped weights"
            self.buffers_saved = False
        self.calls.append(("wake", *sorted(woken)))

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.awake == {"weights", "kv_cache"}, "unmapping what is not mapped"
        self.awake = set()
        if level == 2:
            self.weights, self.buffers_saved = {}, True
        self.calls.append(("sleep", level))

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append(("forget prefixes",))
        if self.unfinished or self.llm_engine.queue:
            return False  # what requests hold stays cached, and nothing but the answer tells of it
        self.prefixes_of = None
        return True

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: Any = None) -> list:
        assert "weights" in self.awake, "writing to memory that is not there"
        if method == "load_tropd_tensors":
            self.weights = {name: tensor.clone() for name, tensor in args[0]}
            self.loads += 1
        self.calls.append((method,))
        return [None]

    def generate(self, prompts: list[Any], sampling_params: list[Any], *, use_tqdm: bool = True) -> list[Any]:
        """As _run_engine: numbered in order, finished in another, sorted at the end."""
        assert self.awake == {"weights", "kv_cache"} and self.weights, "writing without memory or weights"
        assert self.prefixes_of in (None, self.loads), "prefixes of other weights"
        self.prefixes_of = self.loads
        self.calls.append(("generate",))
        self.seen = sampling_params
        assert not self.llm_engine.queue, "requests of an earlier call"
        self.enqueue(prompts, sampling_params, use_tqdm=use_tqdm)
        outputs: list[Any] = []
        while self.llm_engine.queue:
            outputs += [o for o in self.llm_engine.step() if o.finished]
        return sorted(outputs, key=lambda o: int(o.request_id))

    def enqueue(self, prompts: list[Any], sampling_params: list[Any], *, use_tqdm: bool = True) -> None:
        answers = [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]
        for answer in answers:
            answer.request_id, answer.finished = str(self.request_counter.counter), True
            self.request_counter.counter += 1
        self.llm_engine.queue = random.sample([*self.llm_engine.queue, *answers], len(self.llm_engine.queue + answers))

    def _answer(self, prompt: list[int], parameters: Any) -> Any:
        draw = random.Random(parameters.seed)
        tokens = [draw.randrange(4, TOKENS) for _ in range(parameters.max_tokens)]
        finished = draw.random() < 0.5
        tokens = [*tokens[:-1], EOS] if finished else tokens
        level = float(self.weights["model.norm.weight"].double().sum())
        steps = [-t - level for t in tokens]
        reason = "stop" if finished else "length"
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason)])


class Colocated:
    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = make_tiny(folder, layers=2, vocab=ROWS, seed=random.randrange(1 << 30))
        self.made: list[RecordingLLM] = []
        engine_keys = {k: changes.pop(k) for k in ("sleeps", "world_size") if k in changes}
        settings = {"dtype": "float32", "max_model_len": 64, "true_vocab_size": TOKENS, "enforce_eager": False}
        self.engine = ColocatedEngine(
            EngineSettings(self.folder, **(settings | changes)), make_llm=self._make, **engine_keys
        )

    def _make(self, **arguments: Any) -> RecordingLLM:
        self.made.append(RecordingLLM(**arguments))
        return self.made[-1]

    @property
    def llm(self) -> RecordingLLM:
        return self.made[-1]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        yield from load_file(self.folder / "model.safetensors").items()

    def calls(self) -> list[tuple]:
        calls, self.llm.calls = self.llm.calls, []
        return calls


def requests(count: int = 5) -> list[RolloutRequest]:
    draw = random.Random(random.random())
    return [
        RolloutRequest(
            [draw.randrange(TOKENS) for _ in range(4)], [7] * (i % 2), draw.getrandbits(60), 10 + i, i, 3 + i
        )
        for i in range(count)
    ]


def test_it_wakes_refreshes_writes_and_sleeps_in_this_order(tmp_path: Path) -> None:
    colocated = Colocated(tmp_path)
    engine = colocated.engine
    engine.start()
    assert colocated.calls() == [("start", "0"), ("sleep", 2)]
    stats = engine.update_weights(colocated.stream(), 4)
    assert stats.bytes == sum(t.numel() * t.element_size() for _, t in colocated.stream()) and stats.seconds > 0
    assert colocated.calls() == [
        ("wake", "weights"),
        ("begin_tropd_refresh",),
        ("load_tropd_tensors",),
        ("finish_tropd_refresh",),
        ("forget prefixes",),
    ]
    asked = requests()
    rollouts = engine.generate(asked)
    assert colocated.calls() == [("wake", "kv_cache"), ("forget prefixes",), ("generate",)]
    assert engine.sleep() is True  # the weights are gone
    assert colocated.calls() == [("sleep", 2)]
    for request, rollout in zip(asked, rollouts, strict=True):
        assert (rollout.prompt_ids, rollout.prefix_ids) == (request.prompt_ids, request.prefix_ids)
        assert (rollout.sequence_id, rollout.weight_version) == (request.sequence_id, 4)
        assert rollout.finished == (rollout.response_ids[-1] == EOS)
        assert len(rollout.response_ids) == request.max_new_tokens == len(rollout.response_log_probs)


def test_every_request_has_its_seed_and_padding_is_never_drawn(tmp_path: Path) -> None:
    colocated = Colocated(tmp_path)
    colocated.engine.start()
    colocated.engine.update_weights(colocated.stream(), 0)
    asked = requests()
    colocated.engine.generate(asked)
    seen = colocated.llm.seen
    assert [(s.seed, s.max_tokens) for s in seen] == [(r.seed, r.max_new_tokens) for r in asked]
    assert all(set(s.logit_bias) == set(range(TOKENS, ROWS)) and s.stop_token_ids == [EOS] for s in seen)
    assert all(s.logprobs == 0 and not s.detokenize for s in seen)
    arguments = colocated.llm.arguments
    assert arguments["logprobs_mode"] == "processed_logprobs" and arguments["enforce_eager"] is False
    assert arguments["enable_sleep_mode"] is True and "distributed_executor_backend" not in arguments


def test_asleep_it_writes_nothing_until_it_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colocated = Colocated(tmp_path)
    engine = colocated.engine
    with pytest.raises(EngineError, match="not running"):
        engine.generate(requests())
    engine.start()
    with pytest.raises(EngineError, match="has no weights"):
        engine.generate(requests())
    engine.update_weights(colocated.stream(), 0)
    engine.sleep()  # part of it still slept: vLLM would unmap that twice
    engine.sleep()
    with pytest.raises(EngineError, match=r"has no weights .discarded by sleep"):
        engine.generate(requests())
    engine.update_weights(colocated.stream(), 1)
    assert {r.weight_version for r in engine.generate(requests())} == {1}
    engine.sleep()
    ended: list[Any] = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", ended.append)
    llm = colocated.llm
    engine.close()
    engine.close()
    assert llm.calls[-3:] == [("wake", "weights"), ("wake", "kv_cache"), ("shutdown",)]
    assert ended == []  # the trainer's group stays
    torch.distributed.destroy_process_group("other")
    assert ended == ["other"]


def test_prefixes_of_other_weights_are_never_used(tmp_path: Path) -> None:
    """vLLM keeps its cache while a request is unfinished, as one is whose call was interrupted."""
    colocated = Colocated(tmp_path, sleeps=False)
    engine = colocated.engine
    engine.start()
    engine.update_weights(colocated.stream(), 0)
    engine.generate(requests())
    colocated.llm.unfinished = 1
    with pytest.raises(EngineError, match="keeps cached prefixes"):
        engine.update_weights(colocated.stream(), 1)
    with pytest.raises(EngineError, match="has no weights"):
        engine.generate(requests())


def test_without_sleep_memory_and_weights_stay(tmp_path: Path) -> None:
    colocated = Colocated(tmp_path, sleeps=False, world_size=2, tensor_parallel=2)
    engine = colocated.engine
    engine.start()
    engine.update_weights(colocated.stream(), 3)
    assert engine.sleep() is False
    engine.generate(requests())
    assert not [c for c in colocated.calls() if c[0] in ("sleep", "wake")]
    assert colocated.llm.arguments["distributed_executor_backend"] == "external_launcher"
    assert colocated.llm.arguments["tensor_parallel_size"] == 2


@pytest.mark.parametrize("fault", ["missing", "twice", "unknown", "shape"])
def test_a_stream_that_does_not_fit_leaves_no_weights(tmp_path: Path, fault: str) -> None:
    colocated = Colocated(tmp_path)
    engine = colocated.engine
    engine.start()
    tensors = list(colocated.stream())
    torn = {
        "missing": tensors[:-1],
        "twice": [*tensors, tensors[0]],
        "unknown": [*tensors, ("model.ghost.weight", torch.zeros(1))],
        "shape": [(n, t[..., :-1] if i == 2 else t) for i, (n, t) in enumerate(tensors)],
    }[fault]
    with pytest.raises(WeightStreamError):
        engine.update_weights(iter(torn), 1)
    with pytest.raises(EngineError, match="has no weights"):
        engine.generate(requests())


def test_an_engine_that_cannot_start_names_the_keys_to_change(tmp_path: Path) -> None:
    def broken(**arguments: Any) -> Any:
        raise ValueError("Free memory on device is less than desired")

    folder = make_tiny(tmp_path / "model")
    engine = ColocatedEngine(EngineSettings(folder, dtype="float32", max_model_len=32), make_llm=broken)
    with pytest.raises(EngineError, match=r"Free memory[\s\S]*model\.rollout\.gpu_memory_utilization"):
        engine.start()
    with pytest.raises(EngineError, match="not running"):
        engine.update_weights(iter(()), 0)


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_TEST_A", "old")
    monkeypatch.delenv("ROLLOUT_TEST_B", raising=False)
    with pytest.raises(KeyError), environment({"ROLLOUT_TEST_A": "new", "ROLLOUT_TEST_B": "new"}):
        assert os.environ["ROLLOUT_TEST_A"] == os.environ["ROLLOUT_TEST_B"] == "new"
        raise KeyError
    assert os.environ["ROLLOUT_TEST_A"] == "old" and "ROLLOUT_TEST_B" not in os.environ


class ThreadRanks:
    """Ranks as threads: data-parallel groups of ``tensor`` ranks each."""

    def __init__(self, rank: int, tensor: int, shared: dict[str, Any]) -> None:
        self.rank, self.shared = rank, shared
        self.data_rank, self.tensor_rank = divmod(rank, tensor)
        self.data_size = shared["size"] // tensor
        self.is_leader, self.votes = rank == 0, 0

    def gather_objects(self, obj: Any) -> list[Any]:
        self.shared["slots"][self.rank] = obj
        self.shared["barrier"].wait(20)
        everyone = list(self.shared["slots"])
        self.shared["barrier"].wait(20)
        return everyone

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        return self.gather_objects(obj)[src]

    def any_tensor_rank(self, flag: bool) -> bool:
        self.votes += 1
        mine, votes = self.shared["groups"][self.data_rank]
        votes[self.tensor_rank] = flag
        mine.wait(20)
        found = any(votes)
        mine.wait(20)
        return found

    def any_rank(self, flag: bool) -> bool:
        return any(self.gather_objects(flag))

    def any_rank_within(self, flag: bool, seconds: float) -> bool:
        return self.any_rank(flag)


class ForgetfulEngine(ReplayEngine):
    """A replay that, like a sleeping engine, has no weights after sleep."""

    def __init__(self, rank: int) -> None:
        super().__init__(TOKENS)
        self.rank, self.holds, self.asked = rank, False, [0]

    def generate(self, requests: Any, finished: Any = None, *, wanted: Any = None) -> Any:
        assert self.holds
        self.asked.append(len(requests))
        if any(r.prompt_ids == [-1] for r in requests):
            raise RequestError("prompt 3: token id -1")
        return super().generate(requests, finished)

    def update_weights(self, stream: Any, version: int) -> RefreshStats:
        self.holds = True
        return super().update_weights(stream, version)

    def sleep(self) -> bool:
        self.holds = False
        return True


def on_threads(size: int, tensor: int, work: Any) -> list[Any]:
    shared: dict[str, Any] = {"size": size, "slots": [None] * size, "barrier": threading.Barrier(size)}
    shared["groups"] = [(threading.Barrier(tensor), [False] * tensor) for _ in range(size // tensor)]
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, tensor, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize(("size", "tensor", "count"), [(1, 1, 5), (4, 2, 7), (3, 1, 2), (4, 1, 11)])
def test_groups_share_the_requests_and_every_rank_gets_all_rollouts(size: int, tensor: int, count: int) -> None:
    asked, engines = requests(count), [ForgetfulEngine(rank) for rank in range(size)]

    def work(ranks: ThreadRanks) -> Any:
        rollouts = EveryRankRollouts(ranks, lambda: engines[ranks.rank], lambda: iter([("w", torch.ones(3))]), TOKENS)
        first = rollouts.generate(asked if ranks.is_leader else None, 5)
        rollouts.sleep()
        again = rollouts.generate(asked if ranks.is_leader else None, 5)  # refreshed by itself: it had no weights
        assert rollouts.last_refresh is not None and rollouts.last_refresh.bytes == 12
        return first, again

    whole = ForgetfulEngine(0)
    whole.update_weights(iter(()), 5)
    expected = whole.generate(asked)
    for result in on_threads(size, tensor, work):
        assert not isinstance(result, Exception), result
        assert result == (expected, expected)
    shares = [sum(e.asked) for e in engines[::tensor]]
    assert sum(shares) == 2 * count and max(shares) - min(shares) <= 2


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (2, 1), (4, 2), (3, 3)])
def test_a_request_to_stop_ends_the_rollouts_of_a_tensor_group_behind_one_step(
    size: int, tensor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other groups as well, if they have heard of it; then the engines sleep, and take weights and requests again.
    In each group the request becomes overdue on one rank alone."""
    many = [replace(r, max_new_tokens=1) for r in requests(200)]
    groups, calm = range(size // tensor), threading.Event()
    guilty = {data: (data * tensor + random.randrange(tensor), random.randrange(1, 40)) for data in groups}
    here, made = threading.local(), [Colocated(tmp_path / str(rank)) for rank in range(size)]
    steps = [0] * size

    class OverdueHere:
        @property
        def overdue(self) -> bool:
            rank, after = guilty[here.rank // tensor]
            return not calm.is_set() and rank == here.rank and steps[rank] >= after

    def one_a_step(self: SteppingEngine) -> list[Any]:
        steps[here.rank] += 1
        return [self.queue.pop()]

    monkeypatch.setattr(collective, "STOP", OverdueHere())
    monkeypatch.setattr(SteppingEngine, "step", one_a_step)

    def work(ranks: ThreadRanks) -> Any:
        here.rank = ranks.rank
        colocated = made[ranks.rank]
        rollouts = EveryRankRollouts(ranks, lambda: colocated.engine, colocated.stream, TOKENS)
        with pytest.raises(Stopped, match="asked to stop"):
            rollouts.generate(many if ranks.is_leader else None, 3)
        stopped_at, asleep = steps[ranks.rank], not colocated.llm.awake
        ranks.gather_objects(None)
        calm.set()
        again = rollouts.generate(many if ranks.is_leader else None, 3)
        return stopped_at, asleep, again, ranks.votes, steps[ranks.rank] - stopped_at

    found = on_threads(size, tensor, work)
    for data in groups:
        of_group = found[data * tensor :][:tensor]
        assert not any(isinstance(one, Exception) for one in of_group), of_group
        after = guilty[data][1]
        assert {stopped_at for stopped_at, *_ in of_group} == {-(-after // VOTE_STEPS) * VOTE_STEPS}
        for stopped_at, asleep, again, votes, more in of_group:
            assert asleep and [r.sequence_id for r in again] == [r.sequence_id for r in many]
            assert votes == stopped_at // VOTE_STEPS + more // VOTE_STEPS


def test_an_error_of_one_group_is_raised_on_every_rank() -> None:
    asked = [*requests(3), RolloutRequest([-1], [], 0, 99, 3, 4)]

    def work(ranks: ThreadRanks) -> Any:
        rollouts = EveryRankRollouts(
            ranks, lambda: ForgetfulEngine(ranks.rank), lambda: iter([("w", torch.ones(3))]), TOKENS
        )
        return rollouts.generate(asked if ranks.is_leader else None, 0)

    results = on_threads(4, 2, work)
    assert all(isinstance(r, RequestError) and "token id -1" in str(r) for r in results), results


def test_placement_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    from nemo_tropd.rollout.placement import placement_of
    from tests.e2e.compose import compose_config
    from tests.e2e.tiny_run import TinyRun

    tiny = TinyRun.at(tmp_path)

    def config(**keys: object) -> Any:
        return compose_config(tiny.overrides(tmp_path / "run", **keys))

    assert placement_of(config(), on_gpu=False) == "process" and placement_of(config(), on_gpu=True) == "colocated"
    assert placement_of(config(pipeline=2), on_gpu=True) == "process"
    asked = {"model.rollout.placement": "colocated"}
    assert placement_of(config(**asked), on_gpu=True) == "colocated"
    with pytest.raises(ConfigError, match=r"placement = 'colocated': there is no GPU here"):
        placement_of(config(**asked), on_gpu=False)
    with pytest.raises(ConfigError, match=r"placement = 'colocated': .*pipeline_model_parallel_size is 2"):
        placement_of(config(pipeline=2, **asked), on_gpu=True)
    with pytest.raises(ConfigError, match=r"model.rollout.placement = 'gpu': choose one of auto"):
        config(**{"model.rollout.placement": "gpu"})


def test_rollouts_are_told_when_they_are_finished_and_are_the_same(tmp_path: Path) -> None:
    colocated = Colocated(tmp_path / "model")
    engine = colocated.engine
    engine.start()
    for version in (1, 2):
        engine.update_weights(colocated.stream(), version)
        wanted, told = requests(6), list[Any]()
        rollouts = engine.generate(wanted, told.append)
        assert [r.sequence_id for r in rollouts] == [r.sequence_id for r in wanted]
        assert sorted(told, key=lambda r: r.sequence_id) == rollouts == engine.generate(wanted)
        assert "step" not in vars(colocated.llm.llm_engine)  # nobody watches any longer
    colocated.llm.request_counter = SimpleNamespace(counter=4)
    numbered = colocated.llm.generate

    def otherwise(*args: Any, **more: Any) -> Any:
        colocated.llm.request_counter.counter += 2
        return numbered(*args, **more)

    colocated.llm.generate = otherwise
    with pytest.raises(EngineError, match="numbers requests otherwise than as they come"):
        engine.generate(wanted, told.append)


def test_further_requests_come_in_between_two_steps(tmp_path: Path) -> None:
    """Their rollouts are those of one list, wherever they came in; an engine with nothing left waits for some."""
    colocated = Colocated(tmp_path / "model")
    engine = colocated.engine
    engine.start()
    engine.update_weights(colocated.stream(), 1)
    for _ in range(10):
        wanted, told, waits = requests(12), list[Any](), list[bool]()
        left = wanted[4:]

        def further(wait: bool, left: list[Any] = left, waits: list[bool] = waits) -> list[Any] | None:
            waits.append(wait)
            if not left:
                return None
            some = [left.pop(0) for _ in range(random.randint(0, len(left)))]
            return some

        colocated.calls()
        rollouts = engine.generate(wanted[:4], told.append, further)
        assert colocated.calls().count(("forget prefixes",)) == 1
        assert rollouts == engine.generate(wanted) and waits[0] is False
        assert sorted(told, key=lambda r: r.sequence_id) == rollouts
        assert "step" not in vars(colocated.llm.llm_engine)
    late = iter([[], wanted[:2], [], None])
    assert engine.generate([], None, lambda wait: next(late)) == rollouts[:2]
    bad = iter([[RolloutRequest([1] * 60, [], 1, 0, 0, 9)]])
    with pytest.raises(RequestError, match="context of 64"):
        engine.generate(wanted[:1], None, lambda wait: next(bad))


def over_the_wire(tmp_path: Path) -> tuple[Colocated, Engine]:
    """An engine with weights, and a client of its server."""
    colocated = Colocated(tmp_path / "model", sleeps=False)
    colocated.engine.start()
    colocated.engine.update_weights(colocated.stream(), 1)
    client, (ours, theirs) = Engine(colocated.engine.settings, answer_timeout_s=20.0), socket.socketpair()
    client.connect([w.Wire(ours, "member 0")])
    server = EngineServer(lambda *_: colocated.engine, True, colocated.engine)
    threading.Thread(target=server.serve, args=(w.Wire(theirs),), daemon=True).start()
    return colocated, client


def test_further_requests_reach_vllm_over_the_wire(tmp_path: Path) -> None:
    """Client, server and engine, as on a host: what the client is given while it waits."""
    colocated, client = over_the_wire(tmp_path)
    wanted, told = requests(12), list[Any]()
    left = wanted[4:]

    def further(wait: bool) -> list[Any] | None:
        running = len(wanted) - len(left) - len(told)
        return None if not left else [left.pop(0) for _ in range(min(3, len(left)))] if running < 3 else []

    assert client.generate(wanted[:4], told.append, further) == colocated.engine.generate(wanted)
    assert sorted(told, key=lambda r: r.sequence_id) == colocated.engine.generate(wanted)
    client._let_go()


@pytest.mark.parametrize("queue", [False, True])
def test_what_nobody_waits_for_is_abandoned_and_the_engine_goes_on(tmp_path: Path, queue: bool) -> None:
    """Here, and through client and server, of which the client is the engine of a host."""
    colocated, client = over_the_wire(tmp_path)
    unwanted, steps = threading.Event(), list[int]()

    def one_a_step(self: SteppingEngine) -> list[Any]:
        if len(self.queue) <= 20:
            assert unwanted.wait(20)
            time.sleep(0.2)  # twenty more steps, in which it must be heard
        steps.append(len(self.queue))
        return [self.queue.pop()]

    def wanted_so_often(times: int) -> Iterator[bool]:
        yield from [True] * times
        unwanted.set()
        yield False

    for engine in (colocated.engine, client):
        for times in (0, 1, 5):
            wanted, told, looks = requests(30), list[Any](), wanted_so_often(times)
            unwanted.clear()
            steps.clear()
            more = (lambda wait: []) if queue else None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SteppingEngine, "step", one_a_step)
                with pytest.raises(Abandoned, match="nobody waits"):
                    engine.generate(wanted, told.append, more, looks.__next__)
            assert not colocated.llm.llm_engine.queue and len(told) <= len(steps) < 30
            assert "step" not in vars(colocated.llm.llm_engine)
            again = engine.generate(wanted)
            assert [r.sequence_id for r in again] == [r.sequence_id for r in wanted]
            assert all(r in again for r in told)
    assert client.members
    client._let_go()
