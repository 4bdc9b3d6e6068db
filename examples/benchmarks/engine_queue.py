"""Seconds that engines of given speed take for a batch of unequal responses: fixed shares beside one queue.

    python examples/benchmarks/engine_queue.py [--engines 2 4 8] [--slots 8] [--prompts 128] [--out FILE]

The real client, wire and servers. In vLLM's place each server has an engine that generates one token a step of each of
at most --slots sequences. Responses of a prompt are alike, those of different prompts differ by a factor of ten and
more; four of each prompt are asked for, first where nothing is known of a prompt, then where one earlier response is.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this file is run, its siblings are imported

from examples.benchmarks.tables import show
from nemo_tropd.batch import Rollout
from nemo_tropd.quiet import quiet_libraries
from nemo_tropd.rollout.engine import Finished, Further, RefreshStats, RolloutRequest, Wanted
from nemo_tropd.rollout.vllm import wire as w
from nemo_tropd.rollout.vllm.remote import RemoteEngine
from nemo_tropd.rollout.vllm.server import EngineServer
from nemo_tropd.rollout.vllm.settings import EngineSettings

HEADER = (
    "engines",
    "earlier responses",
    "bound, s",
    "fixed, s",
    "queue, s",
    "queue / fixed",
    "fixed / bound",
    "queue / bound",
)
LONGEST, SAMPLES = 1000, 4
Length = Callable[[RolloutRequest], int]


class SlottedEngine:
    """Generates a token a step, of ``step_s`` seconds, of each of at most ``slots`` sequences; the others wait."""

    def __init__(self, length: Length, slots: int, step_s: float) -> None:
        self.length, self.slots, self.step_s = length, slots, step_s
        self.asked = 0

    def start(self) -> None:
        """Nothing to start."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        finished: Finished | None = None,
        further: Further | None = None,
        wanted: Wanted | None = None,
    ) -> list[Rollout]:
        """As vLLM, in time."""
        waiting, running, rollouts = deque(requests), list[tuple[int, RolloutRequest]](), list[Rollout]()
        step, over, due = 0, further is None, time.monotonic()
        while waiting or running or not over:
            if further is not None and not over:
                some = further(not (waiting or running))
                over = some is None
                waiting.extend(some or ())
            while waiting and len(running) < self.slots:
                self.asked += 1
                running.append((step + self.length(waiting[0]), waiting.popleft()))
            if not running:
                continue
            step, due = step + 1, max(due + self.step_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            for end, r in running:
                if end == step:
                    ids = [0] * self.length(r)
                    scores = [-1.0] * len(ids)
                    rollouts.append(Rollout(r.prompt_ids, [], ids, scores, 0, r.sequence_id, r.prompt_index, True))
                    if finished is not None:
                        finished(rollouts[-1])
            running = [(end, r) for end, r in running if end > step]
        return sorted(rollouts, key=lambda r: r.sequence_id)

    def update_weights(self, stream: Iterable[tuple[str, Any]], version: int) -> RefreshStats:
        """It has none."""
        raise NotImplementedError

    def sleep(self) -> bool:
        """It holds no memory."""
        return False

    def close(self, *, run_over: bool = False) -> None:
        """Nothing to close."""


class Members(RemoteEngine):
    """The client, of servers in threads of this process."""

    def connect(self, engines: Sequence[SlottedEngine]) -> None:
        """Serve ``engines``."""
        for i, engine in enumerate(engines):
            ours, theirs = socket.socketpair()
            server = EngineServer(_made_already, True, engine)
            threading.Thread(target=server.serve, args=(w.Wire(theirs),), daemon=True).start()
            self._members.append(w.Wire(ours, f"engine {i}"))
        self._ready = True

    def close(self, *, run_over: bool = False) -> None:
        """End the servers."""
        self._let_go()

    def _describe(self, members: Sequence[w.Wire], reason: str) -> str:
        return f"{' and '.join(m.name for m in members)}: {reason}"


def _made_already(settings: EngineSettings, threads: int, answer_timeout_s: float) -> SlottedEngine:
    raise NotImplementedError("the server has its engine")


def settings_in(folder: Path, slots: int) -> EngineSettings:
    """Of a model that nobody loads."""
    (folder / "config.json").write_text('{"vocab_size": 9}')
    return EngineSettings(folder, "float32", 2 * LONGEST, max_num_seqs=slots, weights_shapes={"w": (1,)})


def requests_of(prompts: int, first_seed: int) -> list[RolloutRequest]:
    """``SAMPLES`` for each prompt; their seeds count up."""
    places = ((p, p * SAMPLES + s) for p in range(prompts) for s in range(SAMPLES))
    return [RolloutRequest([1 + p % 8], [], first_seed + i, i, p, LONGEST) for p, i in places]


def unequal(r: RolloutRequest) -> int:
    """Tokens of a response: a median of 100 with a spread of a factor of 2.2 between prompts and of 1.3 within one."""
    between, within = random.Random(r.prompt_index), random.Random(r.seed)
    return max(1, min(LONGEST, round(100 * between.lognormvariate(0, 0.8) * within.lognormvariate(0, 0.25))))


def measure(count: int, slots: int, prompts: int, step_s: float, *, known: bool) -> tuple[float, float, float]:
    """Seconds of the bound, of fixed shares, of one queue; ``known``: an earlier response was seen of each prompt."""
    wanted, earlier = requests_of(prompts, 0), requests_of(prompts, 10**6)[::SAMPLES]
    tokens = [unequal(r) for r in wanted]
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_in(Path(folder), slots)
        for queue in (False, True):
            client = Members(settings, queue=queue)
            client.connect([SlottedEngine(unequal, slots, step_s) for _ in range(count)])
            if known and queue:
                client.generate(earlier)
            began = time.monotonic()
            rollouts = client.generate(wanted)
            seconds.append(time.monotonic() - began)
            assert [len(r.response_ids) for r in rollouts] == tokens
            client.close()
    return step_s * max(max(tokens), sum(tokens) / (count * slots)), seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--slots", type=int, default=8, help="sequences that an engine generates at a time")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    o = parser.parse_args()
    quiet_libraries()
    rows = []
    for count in o.engines:
        for known in (False, True):
            bound, fixed, queue = measure(count, o.slots, o.prompts, o.step_ms / 1000, known=known)
            ratios = (queue / fixed, fixed / bound, queue / bound)
            figures = (bound, fixed, queue, *ratios)
            rows.append([str(count), "one a prompt" if known else "none", *(f"{x:.2f}" for x in figures)])
    title = f"{o.prompts} prompts x {SAMPLES}, {o.slots} sequences an engine, steps of {o.step_ms:g} ms"
    show(title, HEADER, rows, o.out)


if __name__ == "__main__":
    main()
