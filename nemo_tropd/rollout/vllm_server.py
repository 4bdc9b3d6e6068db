"""The engine's process: vLLM behind a pair of pipes. Started by ``vllm_engine.VllmEngine``, never by hand.

A process of its own keeps vLLM away from the trainer's distributed group, thread settings, signals and CPU shims, and
makes the engine's death an ordinary event. Inside it vLLM runs its engine core in process: requests are queued before
the first step is taken, so the same list is always scheduled alike.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from nemo_tropd.rollout.channel import ChannelClosed, receive_frame, send_frame

_MULTIPLE_VERSIONS = "the engine's weights changed while it was writing"


class VllmServer:
    """One vLLM engine and the operations the trainer may ask for."""

    def __init__(self, llm_arguments: dict[str, Any], version: int, eos_ids: list[int]) -> None:
        from vllm import LLM

        self._llm = LLM(**llm_arguments)
        self._eos_ids = eos_ids
        self._updating = llm_arguments.get("weight_transfer_config") is not None
        if self._updating:
            self._llm.init_weight_transfer_engine({"init_info": {}})
        self._llm.update_weight_version(str(version))

    def generate(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """Token ids and log-probabilities of every request, flattened in the order of the requests."""
        from vllm import SamplingParams, TokensPrompt

        ids = np.split(np.frombuffer(payload, dtype="<i8"), np.cumsum(header["lengths"])[:-1])
        # Rows past the tokenizer's size have no text: they are never drawn, but keep their log-probability.
        padding = dict.fromkeys(range(*header["padding_ids"]), -100.0) or None
        sampling = [
            SamplingParams(
                temperature=header["temperature"],
                top_p=header["top_p"],
                top_k=header["top_k"],
                seed=seed,
                max_tokens=max_tokens,
                logprobs=0,  # the sampled token alone
                stop_token_ids=self._eos_ids,
                detokenize=False,
                logit_bias=padding,
            )
            for seed, max_tokens in zip(header["seeds"], header["max_new_tokens"], strict=True)
        ]
        # What earlier calls left in the cache would change how this list is scheduled.
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=block.tolist()) for block in ids], sampling, use_tqdm=False
        )
        answers: list[Any] = [output.outputs[0] for output in outputs]
        tokens = [list(answer.token_ids) for answer in answers]
        log_probs = [
            [step[token].logprob for step, token in zip(answer.logprobs, row, strict=True)]
            for answer, row in zip(answers, tokens, strict=True)
        ]
        reply = {
            "lengths": [len(row) for row in tokens],
            "finished": [answer.finish_reason == "stop" for answer in answers],
            "versions": [self._version_of(answer) for answer in answers],
        }
        flat_ids = np.array([t for row in tokens for t in row], dtype="<i8")
        flat_log_probs = np.array([x for row in log_probs for x in row], dtype="<f8")
        return reply, flat_ids.tobytes() + flat_log_probs.tobytes()

    def _version_of(self, answer: Any) -> int:
        """The version vLLM attached to the answer's tokens; its current one where vLLM does not attach any."""
        spans = getattr(answer, "weight_versions", None)
        versions = {span.version for span in spans} if spans else {self._llm.get_weight_version()}
        if len(versions) != 1:
            raise RuntimeError(f"{_MULTIPLE_VERSIONS}: {sorted(versions)}")
        return int(versions.pop())

    def start_update(self) -> None:
        """Open a weight update."""
        self._llm.start_weight_update()

    def bucket(self, path: str) -> None:
        """Take one bucket of weights in."""
        self._llm.update_weights({"update_info": {"path": path}})

    def finish_update(self, version: int) -> None:
        """Close the weight update: the engine now holds the weights numbered ``version``."""
        self._llm.finish_weight_update(weight_version=str(version))
        self._llm.reset_prefix_cache()


def _serve(server: VllmServer, requests: queue.SimpleQueue[tuple[dict[str, Any], bytes]], reply_fd: int) -> None:
    while True:
        header, payload = requests.get()
        operation = header["op"]
        reply: dict[str, Any] = {}
        block = b""
        if operation == "generate":
            reply, block = server.generate(header, payload)
        elif operation == "start_update":
            server.start_update()
        elif operation == "bucket":
            server.bucket(header["path"])
        elif operation == "finish_update":
            server.finish_update(header["version"])
        elif operation == "close":
            send_frame(reply_fd, {"ok": True})
            return
        else:
            raise ValueError(f"unknown operation {operation!r}")
        send_frame(reply_fd, {"ok": True, **reply}, block)


def _end_group() -> None:
    """End this process and every worker vLLM started: they share a session of their own, led by this process."""
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _read_requests(request_fd: int, requests: queue.SimpleQueue[tuple[dict[str, Any], bytes]]) -> None:
    try:
        while True:
            requests.put(receive_frame(request_fd))
    except ChannelClosed:
        _end_group()  # the trainer is gone, however it went


def main() -> None:
    """Serve until told to close, or until the trainer is gone. Any failure is reported once, then the process ends."""
    request_fd, reply_fd = int(sys.argv[1]), int(sys.argv[2])
    for fd in (request_fd, reply_fd):
        os.set_inheritable(fd, False)
    requests: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(request_fd, requests), daemon=True).start()
    try:
        settings, _ = requests.get()
        server = VllmServer(settings["llm"], settings["version"], settings["eos_ids"])
        send_frame(reply_fd, {"ok": True, "pid": os.getpid(), "cwd": str(Path.cwd())})
        _serve(server, requests, reply_fd)
    except Exception as error:  # whatever it was, the trainer is told, and the process ends below
        traceback.print_exc()
        send_frame(reply_fd, {"ok": False, "error": f"{type(error).__name__}: {error}"})
    sys.stdout.flush()
    sys.stderr.flush()
    _end_group()


if __name__ == "__main__":
    main()
