"""One TCP connection between the trainer's leader and an engine host, and what is said over it.

Messages are the frames of ``channel``: a JSON header and raw bytes, so nothing from the network is unpickled. Whoever
reaches the leader's address can join: it belongs on a private network, as torchrun's rendezvous does.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nemo_tropd.batch import Rollout
from nemo_tropd.rollout.engine import RolloutRequest, Sampling
from nemo_tropd.rollout.vllm.channel import ChannelClosed, receive_frame, send_frame
from nemo_tropd.rollout.vllm.settings import EngineSettings

PROTOCOL = 1  # of the messages; leader and hosts must run the same
HELLO_BYTES = 1 << 16  # no first message is longer: whatever is, comes from a stranger
_SEND_TIMEOUT_S = 60
# A peer whose machine or link is gone sends no end of stream: the kernel gives it up after about a minute.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 4))
_USER_TIMEOUT_MS = 60_000


class Link:
    """A connected socket. Every failure of the other side is a ``ChannelClosed``; it is of no use afterwards."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes the socket over."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (*_KEEP_ALIVE, (socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS), (socket.TCP_NODELAY, 1)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = connection
        self.own_address: str = connection.getsockname()[0]

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send one message. Raises ChannelClosed, also where the other side takes nothing for a minute."""
        try:
            send_frame(self._socket.fileno(), header, payload)
        except OSError as error:
            raise ChannelClosed(f"nothing can be sent ({error.strerror})") from error

    def receive(
        self,
        *,
        timeout_s: float | None = None,
        alive: Callable[[], bool] | None = None,
        most_bytes: int | None = None,
    ) -> tuple[dict[str, Any], bytes]:
        """Wait for one message; see ``receive_frame``. Raises ChannelClosed or TimeoutError."""
        try:
            header, payload = receive_frame(
                self._socket.fileno(), alive=alive, timeout_s=timeout_s, most_bytes=most_bytes
            )
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise  # receive_frame's own
            raise ChannelClosed(f"the connection broke ({error.strerror})") from error
        except ValueError as error:
            raise ChannelClosed("it sent something that is no message") from error
        if not isinstance(header, dict):
            raise ChannelClosed("it sent something that is no message")
        return header, payload

    def lost(self) -> bool:
        """Whether the other side has closed or broken the connection."""
        return bool(self._events(select.POLLRDHUP) & (select.POLLRDHUP | select.POLLHUP | select.POLLERR))

    def readable(self) -> bool:
        """Whether a message, or the end, has begun to arrive."""
        return bool(self._events(select.POLLIN))

    def close(self) -> None:
        """Close the connection; twice is fine."""
        self._socket.close()

    def _events(self, wanted: int) -> int:
        if self._socket.fileno() < 0:
            return select.POLLHUP
        waiting = select.poll()
        waiting.register(self._socket.fileno(), wanted)
        found = waiting.poll(0)
        return found[0][1] if found else 0


def pack_requests(requests: Sequence[RolloutRequest]) -> tuple[dict[str, Any], bytes]:
    """Header and bytes of a list of requests: prompt and prefix ids one after the other, int64."""
    header = {
        "prompts": [len(r.prompt_ids) for r in requests],
        "prefixes": [len(r.prefix_ids) for r in requests],
        "seeds": [r.seed for r in requests],
        "sequence_ids": [r.sequence_id for r in requests],
        "prompt_indices": [r.prompt_index for r in requests],
        "max_new_tokens": [r.max_new_tokens for r in requests],
    }
    flat = np.array([token for r in requests for token in (*r.prompt_ids, *r.prefix_ids)], dtype="<i8")
    return header, flat.tobytes()


def unpack_requests(header: dict[str, Any], payload: bytes) -> list[RolloutRequest]:
    """What ``pack_requests`` packed."""
    flat = np.frombuffer(payload, dtype="<i8").tolist()
    names = ("prompts", "prefixes", "seeds", "sequence_ids", "prompt_indices", "max_new_tokens")
    requests, at = [], 0
    for prompt, prefix, seed, sequence_id, prompt_index, most in zip(*(header[n] for n in names), strict=True):
        middle, end = at + prompt, at + prompt + prefix
        requests.append(RolloutRequest(flat[at:middle], flat[middle:end], seed, sequence_id, prompt_index, most))
        at = end
    return requests


def pack_rollouts(rollouts: Sequence[Rollout]) -> tuple[dict[str, Any], bytes]:
    """Header and bytes of rollouts: response ids (int64), then their log-probabilities (float64)."""
    header = {
        "lengths": [len(r.response_ids) for r in rollouts],
        "finished": [r.finished for r in rollouts],
        "versions": [r.weight_version for r in rollouts],
    }
    ids = np.array([token for r in rollouts for token in r.response_ids], dtype="<i8")
    log_probs = np.array([x for r in rollouts for x in r.response_log_probs], dtype="<f8")
    return header, ids.tobytes() + log_probs.tobytes()


def unpack_rollouts(requests: Sequence[RolloutRequest], header: dict[str, Any], payload: bytes) -> list[Rollout]:
    """What ``pack_rollouts`` packed, as the answers to ``requests``."""
    lengths = header["lengths"]
    ids = np.frombuffer(payload, dtype="<i8", count=sum(lengths)).tolist()
    log_probs = np.frombuffer(payload, dtype="<f8", offset=8 * sum(lengths)).tolist()
    ends = np.cumsum(lengths).tolist()
    return [
        Rollout(
            prompt_ids=list(r.prompt_ids),
            prefix_ids=list(r.prefix_ids),
            response_ids=ids[end - length : end],
            response_log_probs=log_probs[end - length : end],
            weight_version=version,
            sequence_id=r.sequence_id,
            prompt_index=r.prompt_index,
            finished=finished,
        )
        for r, end, length, finished, version in zip(
            requests, ends, lengths, header["finished"], header["versions"], strict=True
        )
    ]


def pack_settings(settings: EngineSettings) -> dict[str, Any]:
    """Settings as JSON takes them."""
    fields = asdict(settings) | {"model_dir": str(settings.model_dir.absolute())}
    return {k: dict(v) if k == "weights_shapes" and v is not None else v for k, v in fields.items()}


def unpack_settings(fields: dict[str, Any]) -> EngineSettings:
    """What ``pack_settings`` packed. Raises EngineError where the checkpoint cannot be read on this machine."""
    eos_ids, shapes = fields["eos_ids"], fields["weights_shapes"]
    return EngineSettings(
        **fields
        | {
            "sampling": Sampling(**fields["sampling"]),
            "eos_ids": None if eos_ids is None else tuple(eos_ids),
            "weights_shapes": None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()},
        }
    )
