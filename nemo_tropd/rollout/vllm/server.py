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

from nemo_tropd.rollout.engine import Sampling
from nemo_tropd.rollout.vllm.channel import ChannelClosed, receive_frame, send_frame
from nemo_tropd.rollout.vllm.generate import write


class VllmServer:
    """One vLLM engine and the operations the trainer may ask for."""

    def __init__(self, opening: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**opening["llm"])
        self._version = int(opening["version"])
        self._sampling = Sampling(**opening["sampling"])
        self._end_ids = opening["end_ids"]

    def generate(self, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        """Token ids and log-probabilities of every request, flattened in the order of the requests."""
        ids = np.split(np.frombuffer(payload, dtype="<i8"), np.cumsum(header["lengths"])[:-1])
        answers = write(
            self._llm,
            [block.tolist() for block in ids],
            header["seeds"],
            header["max_new_tokens"],
            sampling=self._sampling,
            end_ids=self._end_ids,
            padding_ids=range(*header["padding_ids"]),
        )
        reply = {
            "lengths": [len(a.token_ids) for a in answers],
            "finished": [a.finished for a in answers],
            "version": self._version,
        }
        flat_ids = np.array([t for a in answers for t in a.token_ids], dtype="<i8")
        flat_log_probs = np.array([x for a in answers for x in a.log_probs], dtype="<f8")
        return reply, flat_ids.tobytes() + flat_log_probs.tobytes()

    def start_update(self) -> None:
        """Open a weight update."""
        self._llm.collective_rpc("begin_tropd_refresh")

    def bucket(self, path: str) -> None:
        """Take one bucket of weights in."""
        self._llm.collective_rpc("load_tropd_bucket", args=(path,))

    def finish_update(self, version: int) -> None:
        """Close the weight update: the engine now holds the weights numbered ``version``."""
        self._llm.collective_rpc("finish_tropd_refresh")
        self._llm.reset_prefix_cache()
        self._version = version


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
        opening, _ = requests.get()
        server = VllmServer(opening)
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
