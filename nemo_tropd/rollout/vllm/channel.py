"""Messages between the trainer and the engine's process: a JSON header and a block of bytes, over a pair of pipes.

Nothing is unpickled: a frame is two lengths (unsigned 64-bit, big-endian), the header, the bytes.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any

_LENGTHS = struct.Struct(">QQ")
_POLL_MS = 100


class ChannelClosed(Exception):
    """The other side is gone."""


def send_frame(fd: int, header: dict[str, Any], payload: bytes = b"") -> None:
    """Write one frame. Raises ChannelClosed when nobody can read it."""
    text = json.dumps(header).encode()
    try:
        for block in (_LENGTHS.pack(len(text), len(payload)) + text, payload):
            view = memoryview(block)
            while view:
                view = view[os.write(fd, view) :]
    except BrokenPipeError as error:
        raise ChannelClosed("the pipe is closed") from error


def receive_frame(
    fd: int,
    *,
    alive: Callable[[], bool] | None = None,
    timeout_s: float | None = None,
    most_bytes: int | None = None,
) -> tuple[dict[str, Any], bytes]:
    """Read one frame, waiting for it.

    ``alive`` is asked ten times a second while nothing arrives. Raises ChannelClosed at the end of the pipe, when
    ``alive`` answers False, or for a frame of more than ``most_bytes``; TimeoutError when ``timeout_s`` have passed.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    # poll, not select: that one refuses descriptors past 1023, which a large job can reach.
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)

    def read(count: int) -> bytes:
        blocks = []
        while count:
            if not waiting.poll(_POLL_MS):
                if alive is not None and not alive() and not waiting.poll(0):
                    raise ChannelClosed("the process has ended")
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"no answer within {timeout_s:.0f} s")
                continue
            block = os.read(fd, min(count, 1 << 20))
            if not block:
                raise ChannelClosed("the pipe is closed")
            blocks.append(block)
            count -= len(block)
        return b"".join(blocks)

    header_length, payload_length = _LENGTHS.unpack(read(_LENGTHS.size))
    if most_bytes is not None and header_length + payload_length > most_bytes:
        raise ChannelClosed(f"a frame longer than the {most_bytes} bytes that are taken here")
    header = json.loads(read(header_length))
    return header, read(payload_length)
