"""A host of one rollout engine, on a machine (or a GPU) that trains nothing.

    python -m nemo_tropd.rollout.engine_host --join HOST:PORT --index I

One such process an engine; ``CUDA_VISIBLE_DEVICES`` chooses its GPU. HOST:PORT is the trainer's
``model.rollout.dedicated.address``, I counts from 0. The settings come from the trainer; the student's checkpoint must
be readable here under the same path. It ends with code 0 when the trainer has ended; where the trainer is lost without
a word (it may come back from its last checkpoint) it waits ``--wait-s`` seconds for it, then ends with code 2.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_tropd.config import ConfigError, host_and_port
from nemo_tropd.rollout.collective import describe
from nemo_tropd.rollout.engine import EngineError, RolloutEngine
from nemo_tropd.rollout.vllm.channel import ChannelClosed
from nemo_tropd.rollout.vllm.host_link import (
    PROTOCOL,
    Link,
    pack_rollouts,
    unpack_requests,
    unpack_settings,
)
from nemo_tropd.rollout.vllm.in_process import ColocatedEngine
from nemo_tropd.rollout.vllm.remote import VllmEngine
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.weights.broadcast import WeightGroup, empty_bucket, join_store, take_apart

_RETRY_S = 0.5
_CONNECT_TIMEOUT_S = 10.0
_WELCOME_TIMEOUT_S = 120.0  # the leader welcomes one host at a time

# (settings, OpenMP threads, seconds an answer may take) -> an engine that is not started
EngineFactory = Callable[[EngineSettings, int, float], RolloutEngine]


def own_engine(settings: EngineSettings, threads: int, answer_timeout_s: float) -> RolloutEngine:
    """vLLM: in this process on a GPU, which nothing else uses, else in a child process."""
    if torch.cuda.is_available():
        return ColocatedEngine(settings, sleeps=False)
    return VllmEngine(settings, threads=threads, answer_timeout_s=answer_timeout_s)


class EngineHost:
    """The engine of this host, and the operations the leader may ask for. The engine outlives a lost leader."""

    def __init__(self, index: int, make_engine: EngineFactory) -> None:
        self._index, self._make_engine = index, make_engine
        self._engine: RolloutEngine | None = None
        self._made_of: tuple[Any, ...] | None = None
        self._group: WeightGroup | None = None

    def hello(self) -> dict[str, Any]:
        """The first message of a session."""
        return {
            "protocol": PROTOCOL,
            "index": self._index,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "host": socket.gethostname(),
            "process": os.getpid(),
        }

    def serve(self, link: Link) -> bool:
        """Do what the leader asks until it says so (True) or is gone (False)."""
        try:
            while True:
                header, payload = link.receive()
                if header["op"] == "close":
                    return True
                link.send(*self._answer(link, header, payload))
        except ChannelClosed:
            return False
        finally:
            self._leave_group()

    def close(self) -> None:
        """End the engine and leave the group."""
        self._leave_group()
        self._end_engine()

    def _answer(self, link: Link, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            reply, block = self._do(link, header, payload)
        except BaseException as error:
            self._end_engine()  # whatever it was doing is half done
            if isinstance(error, ChannelClosed) or not isinstance(error, Exception):
                raise
            traceback.print_exc()
            kind, text = describe(error)
            return {"ok": False, "kind": kind, "error": text}, b""
        return {"ok": True, **reply}, block

    def _do(self, link: Link, header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        operation = header["op"]
        if operation == "open":
            self._open(header)
        elif operation == "group":
            self._join_group(link, header)
        elif operation == "generate":
            return pack_rollouts(self._running().generate(unpack_requests(header, payload)))
        elif operation == "update":
            self._running().update_weights(self._received(link), int(header["version"]))
        else:
            raise EngineError(f"the leader asked for {operation!r}, which this host does not know")
        return {}, b""

    def _open(self, header: dict[str, Any]) -> None:
        made_of = (header["settings"], header["threads"], header["answer_timeout_s"])
        if self._engine is not None and self._made_of == made_of:
            return  # its weights are refreshed before it writes
        self._end_engine()
        engine = self._make_engine(unpack_settings(header["settings"]), *made_of[1:])
        self._engine, self._made_of = engine, made_of
        engine.start()

    def _join_group(self, link: Link, header: dict[str, Any]) -> None:
        self._group = WeightGroup(
            join_store(header["address"], header["port"], header["timeout_s"]),
            rank=header["rank"],
            size=header["size"],
            device="cuda" if torch.cuda.is_available() else "cpu",
            own_address=link.own_address,
            timeout_s=header["timeout_s"],
        )

    def _received(self, link: Link) -> Iterator[tuple[str, Tensor]]:
        """The stream of weights, as the leader broadcasts it."""
        group = self._group
        assert group is not None
        while True:
            header, _ = link.receive()
            if header["op"] == "finish":
                return
            flat = empty_bucket(header, group.device)
            group.start_broadcast(flat)
            group.finish_broadcast()
            link.send({"ok": True})
            yield from take_apart(header, flat)

    def _running(self) -> RolloutEngine:
        if self._engine is None:
            raise EngineError("the engine is not running")
        return self._engine

    def _end_engine(self) -> None:
        engine, self._engine, self._made_of = self._engine, None, None
        if engine is not None:
            engine.close()

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


def serve(join: tuple[str, int], index: int, make_engine: EngineFactory, *, wait_s: float) -> None:
    """Host ``index``'s whole life: returns when the leader has said that the run is over.

    Raises EngineError when no leader listens for ``wait_s`` seconds, or it refuses this host.
    """
    host = EngineHost(index, make_engine)
    try:
        while not host.serve(_join(join, host.hello(), wait_s)):
            print("the trainer's leader is gone; waiting for it to come back", flush=True)
    finally:
        host.close()


def _join(join: tuple[str, int], hello: dict[str, Any], wait_s: float) -> Link:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            link = Link(socket.create_connection(join, timeout=_CONNECT_TIMEOUT_S))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            try:
                link.send(hello)
                welcome, _ = link.receive(timeout_s=_WELCOME_TIMEOUT_S)
            except (ChannelClosed, TimeoutError) as error:
                link.close()
                reason = str(error)
            else:
                if welcome.get("ok") is True:
                    return link
                link.close()
                raise EngineError(f"the trainer's leader refused this host: {welcome.get('error')}")
        if time.monotonic() > deadline:
            raise EngineError(
                f"no trainer listened at {join[0]}:{join[1]} for {wait_s:g} s ({reason}); is that its "
                "model.rollout.dedicated.address, and does it run with model.rollout.placement=dedicated?"
            )
        time.sleep(_RETRY_S)


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(prog="python -m nemo_tropd.rollout.engine_host", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="model.rollout.dedicated.address")
    parser.add_argument("--index", required=True, type=int, metavar="I", help="from 0 to engines - 1, each once")
    parser.add_argument(
        "--wait-s", type=float, default=3600.0, help="seconds to wait for the trainer to listen (default %(default)g)"
    )
    given = parser.parse_args()
    try:
        serve(host_and_port("--join", given.join), given.index, own_engine, wait_s=given.wait_s)
    except (ConfigError, EngineError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
