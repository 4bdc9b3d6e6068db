"""Rollout engines on hosts of their own: the leader's side (``engine_host`` is the other).

The leader listens at an address; every host connects to it, is told its settings, and starts an engine. Requests are
dealt out over the hosts in turn. Weights are broadcast once for all hosts, a bucket at a time: every host says when it
has a bucket, so a host that is gone or silent is known by its index, and nobody waits longer than the timeout.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.collective import rebuild
from nemo_tropd.rollout.engine import (
    EngineDied,
    EngineError,
    RefreshStats,
    RolloutRequest,
    check_requests,
)
from nemo_tropd.rollout.vllm.channel import ChannelClosed
from nemo_tropd.rollout.vllm.host_link import (
    HELLO_BYTES,
    PROTOCOL,
    Link,
    pack_requests,
    pack_settings,
    unpack_rollouts,
)
from nemo_tropd.rollout.vllm.settings import DTYPES, EngineSettings
from nemo_tropd.rollout.weights.broadcast import WeightGroup, describe_bucket, flatten, open_store
from nemo_tropd.rollout.weights.stream import buckets, checked_stream

_HELLO_TIMEOUT_S = 5.0
_ACCEPT_POLL_S = 0.2
# A host that dies takes others' broadcasts with it; whose connection ends within so long is the one to name.
_GRACE_S = 1.0


@dataclass(frozen=True)
class _Host:
    index: int
    name: str  # of the machine
    process: int
    link: Link

    def __str__(self) -> str:
        return f"engine host {self.index} (process {self.process} on {self.name})"


class DedicatedEngines:
    """A ``RolloutEngine`` that is many. Where a host fails all are let go, and those that live join the next one."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        address: tuple[str, int],
        engines: int,
        device: str = "cpu",
        threads: int = 1,
        bucket_mib: int = 256,
        timeout_s: float = 300.0,
        start_timeout_s: float = 600.0,
        answer_timeout_s: float = 3600.0,
    ) -> None:
        """Settings only; nothing is opened.

        ``address``: host and port to listen at; on no other interface than that host's.
        ``engines``: hosts, whose indices are 0 to ``engines`` - 1.
        ``device``: cpu or cuda, here and on every host.
        ``threads``: OpenMP threads of an engine on CPU.
        ``bucket_mib``: size of a bucket of weights; leader and hosts hold up to two.
        ``timeout_s``: for all hosts to join, and for a bucket of weights.
        ``start_timeout_s``, ``answer_timeout_s``: for an engine's start, and for the rollouts of one call.
        """
        if min(engines, threads, bucket_mib) < 1:
            raise EngineError("engines, threads and bucket_mib must be at least 1")
        self.settings = settings
        self._shapes, self._optional = settings.shapes
        self._address, self._count, self._device, self._threads = address, engines, device, threads
        self._bucket_bytes = bucket_mib << 20
        self._timeout_s, self._start_timeout_s, self._answer_timeout_s = timeout_s, start_timeout_s, answer_timeout_s
        self._hosts: list[_Host] = []  # by index, all of them, or none
        self._group: WeightGroup | None = None
        self._version: int | None = None  # of the weights in the hosts' engines, once they have come from here

    # ------------------------------------------------------------------------------------------------ life cycle

    def start(self) -> None:
        """Wait for every host to join, and for its engine to start.

        Raises EngineError naming the indices that did not join, or the host whose engine could not start.
        """
        if self._hosts:
            raise EngineError("the engines are running; close them before they are started again")
        self._hosts = self._gather_hosts()
        try:
            self._open()
        except BaseException:
            self._let_go()
            raise

    def sleep(self) -> bool:
        """See ``RolloutEngine.sleep``: nothing here is on the trainer's devices."""
        return False

    def close(self) -> None:
        """Tell every host to end, and leave."""
        for host in self._hosts:
            with suppress(ChannelClosed):
                host.link.send({"op": "close"})
        self._let_go()

    def _let_go(self) -> None:
        """Cut all connections without a word: a host that lives waits for the leader to listen again."""
        for host in self._hosts:
            host.link.close()
        if self._group is not None:
            self._group.close()
        self._hosts, self._group, self._version = [], None, None

    # ------------------------------------------------------------------------------------------------ rollouts

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """See ``RolloutEngine.generate``: request I is served by host I modulo their number."""
        requests = list(requests)
        check_requests(requests, max_model_len=self.settings.max_model_len, vocab_size=self.settings.vocab_size)
        if not requests:
            return []
        self._check_running()
        if self._version is None:
            raise EngineError("the engine hosts hold no weights of the trainer's: refresh them before they write")
        busy = [host for host in self._hosts if host.index < len(requests)]
        shares = [requests[host.index :: self._count] for host in busy]
        for host, share in zip(busy, shares, strict=True):
            header, payload = pack_requests(share)
            self._send(host, {"op": "generate", **header}, payload)
        answers = self._answers(busy, self._answer_timeout_s)
        ordered: list[Rollout | None] = [None] * len(requests)
        for host, share, (header, payload) in zip(busy, shares, answers, strict=True):
            ordered[host.index :: self._count] = unpack_rollouts(share, header, payload)
        rollouts = [r for r in ordered if r is not None]
        assert len(rollouts) == len(requests)
        return rollouts

    # ------------------------------------------------------------------------------------------------ weights

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> RefreshStats:
        """See ``RolloutEngine.update_weights``. Tensors are cast to the engines' dtype before they are sent."""
        self._check_running()
        began, count, total, dtype = time.monotonic(), 0, 0, DTYPES[self.settings.dtype]
        self._version = None
        try:
            self._send_all({"op": "update", "version": version})
            checked = checked_stream(stream, self._shapes, self._optional)
            for tensors, size in buckets(checked, bucket_bytes=self._bucket_bytes, dtype=dtype):
                self._broadcast(tensors)
                count += 1
                total += size
            self._send_all({"op": "finish"})
            self._answers(self._hosts, self._answer_timeout_s)
        except BaseException:
            self._let_go()  # some layers are new and some are old
            raise
        self._version = version
        return RefreshStats(seconds=time.monotonic() - began, bytes=total, buckets=count)

    def _broadcast(self, tensors: dict[str, Tensor]) -> None:
        group = self._group
        assert group is not None
        self._send_all({"op": "bucket", **describe_bucket(tensors, self.settings.dtype)})
        try:
            group.start_broadcast(flatten(tensors, group.device))
            # Not by waiting for the broadcast: that would neither see a host's end nor know whose it was.
            self._answers(self._hosts, self._timeout_s)
            group.finish_broadcast()
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            raise self._died(self._lost(_GRACE_S), f"the broadcast of weights failed: {error}") from error

    # ------------------------------------------------------------------------------------------------ joining

    def _gather_hosts(self) -> list[_Host]:
        host, port = self._address
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise EngineError(
                f"cannot listen for engine hosts at {host}:{port} ({error.strerror or error}); set "
                "model.rollout.dedicated.address to an address of this machine and a port that is free"
            ) from error
        joined: dict[int, _Host] = {}
        deadline = time.monotonic() + self._timeout_s
        print(f"waiting for {self._count} engine host(s): {self._command('I')}", flush=True)
        with listener:
            listener.settimeout(_ACCEPT_POLL_S)
            while len(joined) < self._count:
                if time.monotonic() > deadline:
                    raise self._missing(joined)
                with suppress(TimeoutError):
                    self._admit(Link(listener.accept()[0]), joined)
                for host_ in [h for h in joined.values() if h.link.lost()]:
                    host_.link.close()
                    del joined[host_.index]
        return [joined[i] for i in range(self._count)]

    def _missing(self, joined: dict[int, _Host]) -> EngineError:
        absent = [i for i in range(self._count) if i not in joined]
        for host in joined.values():
            host.link.close()
        return EngineError(
            f"engine host(s) {', '.join(map(str, absent))} of {self._count} did not join within {self._timeout_s:g} s; "
            f"start each on its machine: {self._command('I')}; the run goes on from its last whole checkpoint"
        )

    def _admit(self, link: Link, joined: dict[int, _Host]) -> None:
        try:
            hello, _ = link.receive(timeout_s=_HELLO_TIMEOUT_S, most_bytes=HELLO_BYTES)
            refusal = self._refusal(hello, joined)
            if refusal:
                link.send({"ok": False, "kind": "EngineError", "error": refusal})
                link.close()
                return
            link.send({"ok": True})
        except (ChannelClosed, TimeoutError):
            link.close()  # nobody of ours, or gone again
            return
        host = _Host(hello["index"], str(hello.get("host")), int(hello.get("process", 0)), link)
        joined[host.index] = host
        print(f"{host} joined", flush=True)

    def _refusal(self, hello: dict[str, Any], joined: dict[int, _Host]) -> str | None:
        index, device = hello.get("index"), hello.get("device")
        if hello.get("protocol") != PROTOCOL:
            return f"the leader speaks version {PROTOCOL} of the protocol; run the same nemo_tropd on all hosts"
        if not isinstance(index, int) or not 0 <= index < self._count:
            return f"--index {index}: model.rollout.dedicated.engines is {self._count}, so take 0 to {self._count - 1}"
        if device != self._device:
            return f"the trainer computes on {self._device} and this host on {device}; they must be of one kind"
        if index in joined and not joined[index].link.lost():
            return f"--index {index} is taken by {joined[index]}"
        return None

    def _command(self, index: object) -> str:
        host, port = self._address
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"python -m nemo_tropd.rollout.engine_host --join {shown} --index {index}"

    def _open(self) -> None:
        """Start the engines and meet in the weights' group."""
        opening = {
            "op": "open",
            "settings": pack_settings(self.settings),
            "threads": self._threads,
            "answer_timeout_s": self._answer_timeout_s,
        }
        self._send_all(opening)
        self._answers(self._hosts, self._start_timeout_s)
        size, own_address = self._count + 1, self._hosts[0].link.own_address
        try:
            store = open_store(own_address, self._timeout_s)
            for host in self._hosts:
                header = {"op": "group", "address": own_address, "port": store.port, "rank": host.index + 1}
                self._send(host, {**header, "size": size, "timeout_s": self._timeout_s})
            self._group = WeightGroup(
                store,
                rank=0,
                size=size,
                device=self._device,
                own_address=own_address,
                timeout_s=self._timeout_s,
            )
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            raise self._died(self._lost(_GRACE_S), f"the weights' process group could not be made: {error}") from error
        self._answers(self._hosts, self._timeout_s)

    # ------------------------------------------------------------------------------------------------ messages

    def _check_running(self) -> None:
        if not self._hosts:
            raise EngineDied("the engine hosts are not connected")

    def _send_all(self, header: dict[str, Any]) -> None:
        for host in self._hosts:
            self._send(host, header)

    def _send(self, host: _Host, header: dict[str, Any], payload: bytes = b"") -> None:
        try:
            host.link.send(header, payload)
        except ChannelClosed as error:
            raise self._died([host], str(error)) from error

    def _answers(self, hosts: Sequence[_Host], timeout_s: float) -> list[tuple[dict[str, Any], bytes]]:
        """One answer of each, within ``timeout_s`` for all of them. Raises EngineDied, or what a host raised."""
        deadline = time.monotonic() + timeout_s
        answers = []
        for at, host in enumerate(hosts):
            left = max(0.0, deadline - time.monotonic())
            try:
                header, payload = host.link.receive(timeout_s=left, alive=lambda: not self._lost())
            except ChannelClosed as error:
                raise self._died(self._lost() or [host], str(error)) from error
            except TimeoutError as error:
                silent = [h for h in hosts[at:] if h is host or not h.link.readable()]
                raise self._died(silent, f"no answer within {timeout_s:g} s") from error
            if header.get("ok") is not True:
                lost = self._lost(_GRACE_S)
                text = str(header.get("error"))
                self._let_go()
                if lost and host not in lost:
                    raise self._died(lost, f"the connection ended; {host} then said: {text}")
                raise rebuild((str(header.get("kind")), f"{host}: {text}"))
            answers.append((header, payload))
        return answers

    def _lost(self, grace_s: float = 0.0) -> list[_Host]:
        """Hosts whose connection has ended, or ends within ``grace_s``."""
        until = time.monotonic() + grace_s
        while True:
            lost = [host for host in self._hosts if host.link.lost()]
            if lost or time.monotonic() >= until:
                return lost
            time.sleep(0.02)

    def _died(self, hosts: Sequence[_Host], reason: str) -> EngineDied:
        """The error that names ``hosts`` (none: unknown which), once all are let go."""
        self._let_go()
        names = " and ".join(map(str, hosts)) or "an engine host"
        again = self._command(hosts[0].index if len(hosts) == 1 else "I")
        return EngineDied(
            f"{names}: {reason}; if it has ended start it again: {again}; the run's last checkpoint is whole"
        )
