"""A teacher behind servers: what is asked, what is checked of the answers, and what faults of servers come to."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_tropd.batch import Rollout, TokenBatch
from nemo_tropd.config import ConfigError, TeacherConfig
from nemo_tropd.config_teacher import ServerConfig
from nemo_tropd.parallel.signals import STOP, Stopped
from nemo_tropd.rollout.engine import RolloutRequest, Sampling, check_rollouts
from nemo_tropd.served.answers import Vocabulary, scoring
from nemo_tropd.served.check import Fingerprint, remembered, self_test
from nemo_tropd.served.client import VARIABLE, ServerError, Servers
from nemo_tropd.served.early import EarlyQuestions
from nemo_tropd.served.engine import ServedEngine
from nemo_tropd.served.teacher import ServedTeacher, packed
from tests.fake_vllm import FakeVllm, Refusal, changed, scores_of, serving, toy

ROWS, TOP, LONGEST = 130, 8, 130
VOCABULARY = Vocabulary(128, ROWS)  # two rows of padding


class Ascii:
    """Characters are tokens."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]

    def __len__(self) -> int:
        return 128


def fake(seed: int = 0, **options: Any) -> FakeVllm:
    return FakeVllm(toy(ROWS, seed), ROWS, lambda text: [ord(c) for c in text], **options)


def servers(*urls: str, **settings: Any) -> Servers:
    made = Servers(urls, ServerConfig(**{"timeout_s": 20.0, "give_up_s": 30.0, **settings}))
    made.model = "teacher"
    return made


def tried(made: Servers, noise: float = 0.05, **server: Any) -> Fingerprint:
    teacher = TeacherConfig(path="/m/teacher", server=ServerConfig(noise=noise, **server))
    return self_test(made, teacher, Ascii(), VOCABULARY, top_k=TOP, longest=LONGEST)


@pytest.fixture
def up() -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:
        yield lambda fake, port=0: stack.enter_context(serving(fake, port))


def ids_of(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(128) for _ in range(count)]


def test_scores_are_the_models_without_padding(up: Callable[..., str]) -> None:
    one = fake()
    texts = [ids_of(n, n) for n in (2, 3, 40, 17)]
    found = servers(up(one)).ask([scoring(ids, 1, TOP, VOCABULARY) for ids in texts])
    for ids, scores in zip(texts, found, strict=True):
        rows = one.model(ids)[:-1]
        order = np.argsort(-rows, axis=1)
        for i, row in enumerate(rows):
            asked = order[i][: TOP + 2]
            kept = [v for v in asked if v < 128][:TOP]
            rest = np.log1p(-sum(np.exp(row[v]) for v in asked if v >= 128))
            assert scores.top_k_ids[i].tolist() == kept
            np.testing.assert_allclose(scores.top_k_log_probs[i], row[kept] - rest, atol=1e-6)
            np.testing.assert_allclose(scores.log_probs[i], row[ids[i + 1]] - rest, atol=1e-6)
    assert {body["prompt_logprobs"] for body in one.asked} == {TOP + 2}


def test_only_what_follows_the_prompt_is_scored(up: Callable[..., str]) -> None:
    ids = ids_of(9)
    every, some = servers(up(fake())).ask([scoring(ids, start, TOP, VOCABULARY) for start in (1, 6)])
    assert len(some.log_probs) == 3 and (some.log_probs == every.log_probs[5:]).all()


def _swap(choice: dict[str, Any]) -> None:
    entry = choice["prompt_logprobs"][3]
    best, worst = (next(e for e in entry.values() if e["rank"] == r) for r in (1, TOP + 2))
    best["logprob"], worst["logprob"] = worst["logprob"], best["logprob"]


def _shift(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"][2:], choice["prompt_logprobs"][1]]


def _all(choice: dict[str, Any], value: Callable[[float], float]) -> None:
    for entry in filter(None, choice["prompt_logprobs"]):
        for candidate in entry.values():
            candidate["logprob"] = value(candidate["logprob"])


GARBAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another prompt": (lambda c: c.update(prompt_token_ids=[1, 2]), "about other tokens"),
    "no ids": (lambda c: c.pop("prompt_token_ids"), "about other tokens"),
    "too short": (lambda c: c["prompt_logprobs"].pop(), "log-probabilities of 11 tokens; 12 were sent"),
    "none": (lambda c: c.update(prompt_logprobs=None), "log-probabilities of 0 tokens"),
    "a hole": (lambda c: c["prompt_logprobs"].__setitem__(4, None), "token 4 .* has no log-probability"),
    "one position off": (_shift, "has no log-probability"),
    "few candidates": (lambda c: c["prompt_logprobs"].__setitem__(5, {str(c["prompt_token_ids"][5]): {"logprob": -1}}),
                       "1 candidates; 10"),
    "an id of no row": (lambda c: c["prompt_logprobs"][2].update({"130": c["prompt_logprobs"][2].popitem()[1]}),
                        "token id 130, of a vocabulary of 130"),
    "a huge id": (lambda c: c["prompt_logprobs"][2].update({"9" * 30: c["prompt_logprobs"][2].popitem()[1]}), "proper"),
    "a negative id": (lambda c: c["prompt_logprobs"][2].update({"-1": c["prompt_logprobs"][2].popitem()[1]}), "proper"),
    "not a number": (lambda c: _all(c, lambda _: float("nan")), "proper"),
    "a text": (lambda c: _all(c, lambda _: "x"), "proper"),  # type: ignore[return-value]
    "no order": (_swap, "not in order"),
    "the same rank": (lambda c: [e.update(rank=1) for e in c["prompt_logprobs"][3].values()], "not the 10 best"),
    "logits": (lambda c: _all(c, lambda x: x + 9), "not log-probabilities.*--logprobs-mode raw_logprobs"),
    "low logits": (lambda c: _all(c, lambda x: x - 40), "not log-probabilities"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_asked_for_again(kind: str, up: Callable[..., str]) -> None:
    """One bad answer costs an attempt; a server that gives no other is named with what was wrong."""
    change, message = GARBAGE[kind]
    one, ids = fake(), ids_of(12)
    url = up(one)
    one.fault = changed(change, at_most=1)
    (scores,) = servers(url).ask([scoring(ids, 1, TOP, VOCABULARY)])
    assert len(scores.log_probs) == 11 and len(one.asked) == 2
    one.fault = changed(change)
    with pytest.raises(ServerError, match=f"(?s){url}.*{message}"):
        servers(url, give_up_s=0.01).ask([scoring(ids, 1, TOP, VOCABULARY)])


def _late(*_: Any) -> None:
    time.sleep(20.0)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "killed": (lambda path, body, answer: None, "cannot be reached: RemoteProtocolError"),
    "slow": (_late, r"has not answered within model.teacher.server.timeout_s = 1"),
    "broken": (lambda *_: Refusal(500, "CUDA error"), "answers 500: .*CUDA error"),
    "busy": (lambda *_: Refusal(503, "loading"), "answers 503: .*loading"),
    "no JSON": (lambda *_: b"<html>", "gives no proper answer: JSON is malformed"),
    "deep JSON": (lambda *_: b"[" * 50_000, "gives no proper answer"),
    "endless": (lambda *_: b" " * (1 << 22), r"answers with more than [\d,]+ bytes"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_server_is_left_for_another(kind: str, up: Callable[..., str]) -> None:
    fault, message = FAULTS[kind]
    bad, good, ids = fake(), fake(), ids_of(12)
    bad.fault = fault
    questions = [scoring(ids, 1, TOP, VOCABULARY)] * 6
    urls = up(bad), up(good)
    limit = 1.0 if kind == "slow" else 20.0
    found = servers(*urls, timeout_s=limit).ask(questions)
    assert len(found) == 6 and len(good.asked) >= 6
    with pytest.raises(ServerError, match=f"(?s)give_up_s = 0.3.*{urls[0]}.*{message}.*resumes from its last"):
        servers(urls[0], timeout_s=limit, give_up_s=0.3).ask(questions[:1])


def test_requests_in_flight_are_bounded_and_answers_in_order(up: Callable[..., str]) -> None:
    one, lock, busy, most = fake(), threading.Lock(), [0], [0]

    def fault(path: str, body: Any, answer: Any) -> Any:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.03)
        with lock:
            busy[0] -= 1
        return answer

    one.fault = fault
    texts = [ids_of(n + 2, n) for n in range(12)]
    found = servers(up(one), requests=3).ask([scoring(ids, 1, 1, VOCABULARY) for ids in texts])
    assert [len(s.log_probs) for s in found] == [n + 1 for n in range(12)] and most[0] == 3


def test_a_refusal_is_not_repeated_and_a_token_is_never_shown(
    up: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one = fake()
    url = up(one)
    question = scoring(ids_of(5), 1, TOP, VOCABULARY)
    one.api_key = "sesame-7f3a"
    with pytest.raises(ServerError, match=f"answers 401.*{VARIABLE} is not set: set it on every rank.*--api-key"):
        servers(url).ask([question])
    monkeypatch.setenv(VARIABLE, "wrong-token-1")
    one.fault = lambda path, body, answer: Refusal(401, "not Bearer wrong-token-1")
    with pytest.raises(ServerError, match="is not the token it wants") as failed:
        servers(url).ask([question])
    assert len(one.headers) == 2  # asked once each
    one.fault = lambda path, body, answer: answer
    monkeypatch.setenv(VARIABLE, " sesame-7f3a\n")
    made = servers(url)
    made.ask([question])
    assert one.headers[-1]["Authorization"] == "Bearer sesame-7f3a"
    monkeypatch.setenv(VARIABLE, "two words")
    with pytest.raises(ConfigError) as refused:
        servers(url)
    shown = f"{failed.value}{refused.value}{made!r}{vars(made).keys()}{capfd.readouterr()}"
    assert not [word for word in ("wrong-token-1", "sesame", "two words") if word in shown]


def test_a_stop_does_not_wait_for_servers(up: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = fake()
    one.fault = lambda path, body, answer: time.sleep(20)
    monkeypatch.setattr(type(STOP), "overdue", True)
    began = time.monotonic()
    with pytest.raises(Stopped):
        servers(up(one), timeout_s=60).ask([scoring(ids_of(5), 1, TOP, VOCABULARY)])
    assert time.monotonic() - began < 10


def test_self_test_prints_its_figures_and_keeps_the_name(up: Callable[..., str], capsys: Any) -> None:
    one, two = fake(), fake()
    made = servers(up(one), up(two))
    found = tried(made)
    assert made.model == "teacher"
    ids = list(found.ids)
    np.testing.assert_allclose(found.log_probs, scores_of(one.model, ids), atol=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "times differ by 0 nats a token (at most 0), their first half alone by 0" in lines[0]
    assert "10 candidates a token, 130 ids" in lines[0]


def _refusals() -> dict[str, tuple[Callable[[FakeVllm], object], str, str]]:
    def set_(**values: Any) -> Callable[[FakeVllm], object]:
        return lambda one: vars(one).update(values)

    def constant(ids: list[int]) -> np.ndarray:
        row = np.arange(ROWS) / 100
        return np.tile(row - np.log(np.exp(row).sum()), (len(ids), 1))

    return {
        "k too small": (set_(max_logprobs=9), "model.tropd.top_k", "--max-logprobs 10 .or lower model.tropd.top_k"),
        "another model": (set_(name="other", root="/m/other"), "model.teacher.url", "teacher.server.model=other"),
        "short": (set_(max_model_len=130), "model.teacher.url", "--max-model-len 131"),
        "noisy": (set_(noise=0.3), "model.teacher.server.noise", "--dtype bfloat16 or float32.*VLLM_BATCH_INVARIANT=1"),
        "more ids": (set_(rows=ROWS + 1, model=toy(ROWS + 1)), "model.teacher.url", "has more than the 130 ids"),
        "fewer ids": (set_(rows=ROWS - 1, model=toy(ROWS - 1)), "model.teacher.url", "has fewer than the 130 ids"),
        "other texts": (set_(encode=lambda text: [ord(c) + (c == "q") for c in text]), "model.teacher.url",
                        r"tokenizer is another: token 4 of a text begins \[114, .*--tokenizer"),
        "no model": (set_(model=constant), "model.teacher.url", "do not depend on the tokens before"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", _refusals())
def test_self_test_refuses(kind: str, up: Callable[..., str]) -> None:
    change, key, message = _refusals()[kind]
    one = fake()
    change(one)
    with pytest.raises(ConfigError, match=f"(?s){message}") as refused:
        tried(servers(up(one)))
    assert refused.value.key == key


def test_self_test_refuses_servers_with_two_teachers(up: Callable[..., str]) -> None:
    urls = up(fake(0)), up(fake(1))
    with pytest.raises(ConfigError, match=f"(?s)it and {urls[0]} are .* nats a token apart") as refused:
        tried(servers(*urls))
    assert refused.value.value == urls[1]


def test_a_model_is_taken_by_name(up: Callable[..., str]) -> None:
    one = fake(name="org/Thing", root="org/Thing")
    made = servers(up(one))
    tried(made, model="org/Thing")
    assert made.model == "org/Thing"
    with pytest.raises(ConfigError, match=r"serves org/Thing: set model.teacher.server.model"):
        tried(made, model="absent")


def test_other_weights_are_noticed_after_a_restart(up: Callable[..., str]) -> None:
    """By the next comparison, and at once where the connection broke."""
    one = fake()
    made = servers(up(one), give_up_s=5)
    tried(made)
    one.noise = 0.01  # the same teacher, in bf16
    made.vouch()
    one.model, question = toy(ROWS, 1), scoring(ids_of(9), 1, TOP, VOCABULARY)
    made.ask([question])  # nothing shows it
    with pytest.raises(ServerError, match=r"has another teacher than before step 1.*model.teacher.server.noise = 0.05"):
        made.vouch()
    one.model, closed = toy(ROWS), [True]
    made.vouch()
    one.fault = lambda path, body, answer: None if closed and closed.pop() else answer
    one.model = toy(ROWS, 1)
    with pytest.raises(ServerError, match="has another teacher"):
        made.ask([question])


def test_a_server_that_comes_back_is_used_again(up: Callable[..., str]) -> None:
    one, two = fake(), fake()
    made = servers(up(one), up(two), give_up_s=1)
    tried(made)
    two.fault, before = (lambda path, body, answer: None), len(two.asked)
    questions = [scoring(ids_of(9), 1, TOP, VOCABULARY)] * 4
    made.ask(questions)
    made.vouch()
    with pytest.raises(ServerError, match="have given no answer"):
        made.reach()
    made.ask(questions)
    two.fault, one.asked[:] = (lambda path, body, answer: answer), []
    made.vouch()
    made.ask(questions)
    assert len(one.asked) == 3 and len(two.asked) > before  # each two, and the fixed text


def test_a_fingerprint_is_remembered_within_the_noise(tmp_path: Path) -> None:
    memory, first = tmp_path / "deep" / "known.json", Fingerprint((1, 2, 3), (-1.0, -2.0))
    assert remembered(first, memory, 0.1) == first
    near, far = Fingerprint((1, 2, 3), (-1.05, -2.0)), Fingerprint((1, 2, 3), (-1.5, -2.0))
    assert remembered(near, memory, 0.1) == first and remembered(far, memory, 0.1) == far
    assert remembered(Fingerprint((1, 2), (-1.0,)), memory, 0.1).ids == (1, 2)
    assert len(json.loads(memory.read_text())["teachers"]) == 3
    memory.write_text("{")
    assert remembered(near, memory, 0.1) == near


def test_responses_come_from_the_servers(up: Callable[..., str]) -> None:
    """Seeds give answers; an end token ends one; what the server prefers to sample by is overruled."""
    one = fake()
    engine = ServedEngine(servers(up(one)), VOCABULARY, Sampling(1.0, 0.9, 50), [7, 9])
    requests = [RolloutRequest(ids_of(4, i), [5] * (i % 2), i, i, i, 40) for i in range(8)]
    rollouts = engine.generate(requests)
    check_rollouts(rollouts, requests, version=0, vocab_size=128)
    assert [r.finished for r in rollouts] == [r.response_ids[-1] in (7, 9) for r in rollouts]
    assert len({tuple(r.response_ids) for r in rollouts}) == 8 and any(r.finished for r in rollouts)
    (body,) = [b for b in one.asked if b["seed"] == 3]
    assert body["prompt"] == [*ids_of(4, 3), 5] and (body["top_p"], body["top_k"]) == (0.9, 50)
    assert body["ignore_eos"] and body["repetition_penalty"] == 1 and body["logit_bias"] == {"128": -100, "129": -100}


def batch_of(ids: list[int], number: int) -> TokenBatch:
    rollout = Rollout(ids[:3], ids[3:5], ids[5:], [-1.0] * len(ids[5:]), 0, number, number, True)
    return TokenBatch.pack([rollout], pad_id=0, seed=0, step=0)


class InFlight:
    """Counts questions that are on their way."""

    def __init__(self) -> None:
        self.begun = self.ended = 0

    def __call__(self) -> Callable[[], None]:
        self.begun += 1
        return self.end

    def end(self) -> None:
        self.ended += 1


def early_questions(made: Servers, in_flight: InFlight | None = None) -> EarlyQuestions:
    topology: Any = SimpleNamespace(is_last_stage=True, tensor_rank=0)
    return EarlyQuestions(ServedTeacher(made, topology, VOCABULARY, ""), TOP, in_flight or InFlight())


def test_questions_as_they_come_have_the_answers_of_questions_together(up: Callable[..., str]) -> None:
    one = fake()
    made = servers(up(one), up(fake()))
    texts = {i: ids_of(n, n) for i, n in enumerate((6, 40, 17, 9))}
    expected = made.ask([scoring(ids, 3, TOP, VOCABULARY) for ids in texts.values()])
    early = early_questions(made, in_flight := InFlight())
    early.add(2, batch_of(ids_of(30), 2))  # an engine died, and its successor generated another text
    for i, ids in texts.items():
        early.add(i, batch_of(ids, i))
        time.sleep(0.05)
    deadline = time.monotonic() + 20
    while len(early.ready()) < len(texts) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert early.ready() == texts.keys()
    found = early.collect()
    assert in_flight.begun == in_flight.ended == 1 + len(texts)
    for i, scores in enumerate(expected):
        assert torch.equal(found[i], packed(scores))
    early.close()
    assert all(t.name != "teacher-questions" for t in threading.enumerate())


def test_a_question_that_no_server_answers_ends_the_others(up: Callable[..., str]) -> None:
    slow, refuses = threading.Event(), fake(max_model_len=30)
    refuses.fault = lambda path, body, answer: (len(body["prompt"]) == 40 or slow.wait(20), answer)[1]
    early = early_questions(servers(up(refuses)), in_flight := InFlight())
    for i, count in enumerate((20, 21, 40)):
        early.add(i, batch_of(ids_of(count), i))
    began = time.monotonic()
    while not early._futures[2].done():
        time.sleep(0.02)
    with pytest.raises(ServerError, match="answers 400"):
        early.add(3, batch_of(ids_of(22), 3))  # the others need not be generated to their end
    assert in_flight.begun == 3 and in_flight.ended < 3
    with pytest.raises(ServerError, match="answers 400"):
        early.collect()
    slow.set()
    assert in_flight.ended == 3
    assert time.monotonic() - began < 10 and all(t.name != "teacher-questions" for t in threading.enumerate())


def test_questions_end_when_the_run_is_asked_to_stop(up: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow, server = threading.Event(), fake()
    server.fault = lambda path, body, answer: (slow.wait(20), answer)[1]
    early = early_questions(servers(up(server)))
    early.add(0, batch_of(ids_of(20), 0))
    monkeypatch.setattr(type(STOP), "overdue", property(lambda self: True))
    with pytest.raises(Stopped):
        early.collect()
    slow.set()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "nonsense://user:password@h"])
def test_a_proxy_that_cannot_be_used_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigError, match=r"^ALL_PROXY = '\*\*\*': .*http:// and https:// proxies alone") as refused:
        Servers(["http://teacher:8000"], ServerConfig())
    assert "password" not in str(refused.value)


def test_an_address_that_only_the_client_refuses_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model\.teacher\.url = .* is no address"):
        Servers(["http://\N{SNOWMAN}.net"], ServerConfig())


def test_a_server_that_leads_to_an_impossible_address_is_named() -> None:
    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", "http://xn--a.com/")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Redirects) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ServerError, match="cannot be reached: Invalid"):
                servers(f"http://127.0.0.1:{server.server_port}", give_up_s=0.01).models(
                    f"http://127.0.0.1:{server.server_port}"
                )
        finally:
            server.shutdown()
