"""A small server that speaks as much of vLLM 0.32's /v1/models and /v1/completions as a teacher's client needs, and as
strictly: written from vllm/entrypoints/openai/completion/protocol.py, renderers/base.py and sampling_params.py."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

Model = Callable[[list[int]], np.ndarray]  # ids [N] -> log-probabilities [N, V] of what comes after each


def toy(rows: int, seed: int = 0) -> Model:
    """A model whose next token depends on the two before it."""
    tables = np.random.default_rng(seed).normal(0, 1.5, (2, rows, rows))

    def after(ids: list[int]) -> np.ndarray:
        logits = tables[0][ids] + tables[1][[ids[0], *ids[:-1]]]
        return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))

    return after


def of_checkpoint(folder: Any) -> Model:
    """transformers' own, in fp32."""
    from transformers import AutoModelForCausalLM

    model, lock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), threading.Lock()

    def after(ids: list[int]) -> np.ndarray:
        with lock, torch.no_grad():
            return np.asarray(torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy())

    return after


class Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeVllm:
    """``fault(path, body, answer) -> answer`` may change an answer, sleep, or return bytes or None (no answer at all,
    the connection is closed). ``encode`` is the server's tokenizer."""

    def __init__(self, model: Model, rows: int, encode: Callable[[str], list[int]], **options: Any) -> None:
        self.model, self.rows, self.encode = model, rows, encode
        self.name, self.root, self.api_key = options.get("name", "teacher"), options.get("root", "/m/teacher"), None
        self.max_logprobs, self.max_model_len = options.get("max_logprobs", 20), options.get("max_model_len", 512)
        self.noise = 0.0
        self.fault: Callable[[str, dict[str, Any], Any], Any] = lambda path, body, answer: answer
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._draws = np.random.default_rng(0)

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> Any:
        if self.api_key is not None and key != f"Bearer {self.api_key}":
            raise Refusal(401, "Unauthorized")
        if path == "/v1/models":
            card = {"id": self.name, "object": "model", "root": self.root, "parent": None, "permission": []}
            return {"object": "list", "data": [{**card, "max_model_len": self.max_model_len}]}
        if path != "/v1/completions":
            raise Refusal(404, "Not Found")
        if body["model"] != self.name:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        ids = self.encode(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        k = body.get("prompt_logprobs")
        if k is not None and k > self.max_logprobs:
            allowed = f"which is greater than max allowed: {self.max_logprobs}"
            raise Refusal(400, f"Requested prompt logprobs of {k}, {allowed}")
        if max(ids) >= self.rows or min(ids) < 0:
            raise Refusal(400, f"Token id {max(ids)} is out of vocabulary")
        if len(ids) + body["max_tokens"] > self.max_model_len:
            raise Refusal(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        self.asked.append(body)
        sampled, log_probs = self._sample(body, list(ids))
        choice: dict[str, Any] = {
            "index": 0,
            "text": "x",
            "finish_reason": "length",
            "logprobs": None if body.get("logprobs") is None else {"tokens": [], "token_logprobs": log_probs},
            "prompt_logprobs": None if k is None else self.prompt_logprobs(list(ids), k),
        }
        if body.get("return_token_ids"):
            choice |= {"prompt_token_ids": ids, "token_ids": sampled}
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice], "usage": {}}

    def prompt_logprobs(self, ids: list[int], k: int) -> list[dict[str, Any] | None]:
        """As the sampler gathers them: the token itself, then the k best, in a dictionary by id."""
        found: list[dict[str, Any] | None] = [None]
        for row, token in zip(self.model(ids), ids[1:], strict=False):
            row = row + self.noise * self._draws.normal(size=row.shape)
            row = row - np.log(np.exp(row.astype(np.float64)).sum())
            best = np.argsort(-row, kind="stable")[:k]
            ranked = [(token, int((row >= row[token]).sum())), *((int(b), r + 1) for r, b in enumerate(best))]
            found.append(
                {str(i): {"logprob": max(float(row[i]), -9999.0), "rank": r, "decoded_token": "é"} for i, r in ranked}
            )
        return found

    def _sample(self, body: dict[str, Any], ids: list[int]) -> tuple[list[int], list[float]]:
        draws, start, log_probs = np.random.default_rng(body.get("seed")), len(ids), list[float]()
        for _ in range(body["max_tokens"]):
            row = self.model(ids)[-1].astype(np.float64)
            for token, bias in (body.get("logit_bias") or {}).items():
                row[int(token)] += bias
            chances = np.exp(row - row.max())
            ids = [*ids, int(draws.choice(self.rows, p=chances / chances.sum()))]
            log_probs.append(float(row[ids[-1]]))
            if ids[-1] in body.get("stop_token_ids", ()):
                break
        return ids[start:], log_probs


@contextmanager
def serving(fake: FakeVllm, port: int = 0) -> Iterator[str]:
    """The fake at an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            status: int
            fake.headers.append(dict(self.headers))
            try:
                answer, status = fake.answer(self.path, body, self.headers.get("Authorization")), 200
            except Refusal as error:
                answer, status = {"error": {"message": str(error), "code": error.status}}, error.status
            answer = fake.fault(self.path, body, answer)
            if isinstance(answer, Refusal):
                answer, status = {"error": {"message": str(answer)}}, answer.status
            if answer is None:
                self.close_connection = True
                return
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def changed(change: Callable[[dict[str, Any]], object], at_most: float = math.inf) -> Callable[..., Any]:
    """A fault that changes the choice of so many answers with scores."""
    left = [at_most]

    def fault(path: str, body: dict[str, Any], answer: Any) -> Any:
        if path == "/v1/completions" and body.get("prompt_logprobs") and isinstance(answer, dict) and left[0] > 0:
            left[0] -= 1
            change(answer["choices"][0])
        return answer

    return fault


def scores_of(model: Model, ids: Sequence[int]) -> np.ndarray:
    """log p of every token but the first."""
    return np.asarray(model(list(ids))[:-1][np.arange(len(ids) - 1), list(ids[1:])])
