"""The trainer's side of a refresh, requests and settings, without an engine; the child that outlives no trainer."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_tropd.rollout.engine import (
    EngineError,
    RequestError,
    RolloutRequest,
    Sampling,
    WeightStreamError,
    check_requests,
)
from nemo_tropd.rollout.vllm import child
from nemo_tropd.rollout.vllm.child import VllmEngine, session_members
from nemo_tropd.rollout.vllm.settings import EngineSettings
from nemo_tropd.rollout.vllm.wire import Bucket
from nemo_tropd.rollout.weights.copies import HostCopy
from nemo_tropd.rollout.weights.senders import SharedMemory
from nemo_tropd.rollout.weights.stream import buckets, checked_stream, checkpoint_shapes
from nemo_tropd.training.guidance import request_seed
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.random

SHAPES = {"a": (2, 3), "b": (4,), "lm_head.weight": (2, 3)}
TIED = frozenset({"lm_head.weight"})


def stream(**changes: torch.Tensor | None) -> list[tuple[str, torch.Tensor]]:
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4)} | changes
    return [(name, tensor) for name, tensor in tensors.items() if tensor is not None]


def test_a_whole_stream_passes_unchanged_with_or_without_the_tied_head() -> None:
    for whole in (stream(), [*stream(), ("lm_head.weight", torch.zeros(2, 3))]):
        passed = list(checked_stream(whole, SHAPES, TIED))
        assert [name for name, _ in passed] == [name for name, _ in whole]
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(passed, whole, strict=True))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (stream(b=None), "without 1 of the model's tensors: b"),
        ([], "without 2 of the model's tensors: a, b"),
        (stream(c=torch.zeros(1)), "has c, which the engine's model does not have"),
        (stream() + stream(a=None), "has b twice"),
        (stream(a=torch.zeros(3, 2)), r"a comes as \[3, 2\] but the engine's model has \[2, 3\]"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused_by_name(bad: list[tuple[str, torch.Tensor]], text: str) -> None:
    with pytest.raises(WeightStreamError, match=text):
        list(checked_stream(bad, SHAPES, TIED))


def test_an_untied_head_must_come() -> None:
    with pytest.raises(WeightStreamError, match=r"lm_head\.weight"):
        list(checked_stream(stream(), SHAPES, frozenset()))


def test_buckets_hold_everything_once_cast_and_within_their_size() -> None:
    tensors = {f"t{i}": torch.randn(int(torch.randint(1, 400, ()))) for i in range(30)} | {"big": torch.randn(5000)}
    cut = list(buckets(tensors.items(), bucket_bytes=2000, dtype=torch.bfloat16))
    names = [name for held, _ in cut for name in held]
    assert names == list(tensors)
    for held, size in cut:
        assert size == sum(t.numel() * 2 for t in held.values())
        assert size <= 2000 or list(held) == ["big"]
        assert all(torch.equal(t, tensors[name].bfloat16()) for name, t in held.items())
    assert 3 < len(cut) < 30
    # Greedy: no bucket could have taken the first tensor of the next one.
    for (_, size), (following, _) in itertools.pairwise(cut):
        assert size + next(iter(following.values())).numel() * 2 > 2000


def test_shapes_and_optional_names_of_a_checkpoint(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(5, 2)}, str(tmp_path / "model-1.safetensors"))
    save_file({"x.rotary_emb.inv_freq": torch.zeros(3)}, str(tmp_path / "model-2.safetensors"))
    index = {"weight_map": {"model.embed_tokens.weight": "model-1.safetensors", "x": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    shapes, optional = checkpoint_shapes(tmp_path)
    assert shapes == {"model.embed_tokens.weight": (5, 2), "x.rotary_emb.inv_freq": (3,), "lm_head.weight": (5, 2)}
    assert optional == {"x.rotary_emb.inv_freq", "lm_head.weight"}
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    assert checkpoint_shapes(tmp_path)[1] == {"x.rotary_emb.inv_freq"}
    (tmp_path / "model-2.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(EngineError, match=r"model-2\.safetensors is not a complete safetensors file"):
        checkpoint_shapes(tmp_path)


def test_a_bucket_file_lives_as_long_as_it_is_received(tmp_path: Path) -> None:
    files, tensors, seen = SharedMemory(tmp_path), {"w": torch.randn(7, 5)}, []
    told: list[Bucket] = []

    def receive() -> None:
        path = told[-1].path
        assert path is not None and (told[-1].names, told[-1].shapes, told[-1].dtype) == (["w"], [[7, 5]], "float32")
        seen.append(load_file(path))

    files.send(tensors, told.append, receive)
    assert torch.equal(seen[0]["w"], tensors["w"]) and list(tmp_path.iterdir()) == []

    def refuse() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        files.send(tensors, told.append, refuse)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EngineError, match="MiB free but a bucket of weights takes"):
        files.send({"w": torch.zeros(1).expand(1 << 50)}, told.append, receive)


def test_parts_of_one_parameter_and_turned_ones_arrive(tmp_path: Path) -> None:
    """A student's stream has views: of rows, which share their memory, and transposed ones."""
    fused = torch.randn(9, 4)
    tensors = {"q": fused[:4], "k": fused[4:], "t": fused.T, "own": torch.randn(3)}
    seen: list[dict[str, torch.Tensor]] = []
    told: list[Bucket] = []
    files = SharedMemory(tmp_path)
    files.send(tensors, told.append, lambda: seen.append(load_file(str(told[-1].path))))
    assert {n: t.tolist() for n, t in seen[0].items()} == {n: t.tolist() for n, t in tensors.items()}


def test_a_copy_of_the_weights_is_taken_anew_in_the_same_memory() -> None:
    copy, fused = HostCopy(), torch.randn(9, 4)
    stream = {"q": fused[:4], "t": fused.T}
    assert copy.take(iter(stream.items())) == 4 * (16 + 36)
    kept, at = dict(copy.tensors), {name: tensor.data_ptr() for name, tensor in copy.tensors.items()}
    first = {name: tensor.clone() for name, tensor in stream.items()}
    fused += 1
    assert all(torch.equal(kept[name], first[name]) for name in stream)
    copy.take(iter(stream.items()))
    assert {name: tensor.data_ptr() for name, tensor in copy.tensors.items()} == at
    assert all(torch.equal(copy.tensors[name], stream[name]) for name in stream)
    copy.take(iter({"q": torch.ones(4, 4, dtype=torch.bfloat16)}.items()))
    assert copy.tensors["q"].dtype == torch.bfloat16 and list(copy.tensors) == ["q"]
    copy.take(iter({"q": torch.ones(2), "new": torch.ones(3, dtype=torch.bfloat16)}.items()))
    assert {n: (tuple(t.shape), t.dtype) for n, t in copy.tensors.items()} == {
        "q": ((2,), torch.float32), "new": ((3,), torch.bfloat16),
    }  # fmt: skip


def test_bucket_files_of_gone_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    gone = tmp_path / "nemo_tropd-weights-4194399-x.safetensors"
    young = tmp_path / "nemo_tropd-weights-4194398-x.safetensors"
    own = tmp_path / f"nemo_tropd-weights-{os.getpid()}-x.safetensors"
    foreign = tmp_path / "model-4194399-x.safetensors"
    for file in (gone, young, own, foreign):
        file.write_bytes(b"x")
    for file in (gone, own, foreign):
        os.utime(file, (time.time() - 3600,) * 2)
    SharedMemory(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, own, foreign])
    with pytest.raises(EngineError, match="cannot be written to"):
        SharedMemory(tmp_path / "nowhere")


def request(**changes: object) -> RolloutRequest:
    fields: dict = {
        "prompt_ids": [1, 2, 3],
        "prefix_ids": [4],
        "seed": 0,
        "sequence_id": 0,
        "prompt_index": 17,
        "max_new_tokens": 6,
    }
    return RolloutRequest(**(fields | changes))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (request(max_new_tokens=7), "prompt 17: 3 prompt \\+ 1 prefix \\+ 7 new tokens are 11, over .* context of 10"),
        (request(max_new_tokens=0), "prompt 17: max_new_tokens is 0"),
        (request(prompt_ids=[]), "prompt 17: it has no tokens"),
        (request(prefix_ids=[50]), "prompt 17: token id 50 is outside the engine's vocabulary of 50"),
        (request(prompt_ids=[1, -3]), "prompt 17: token id -3 is outside"),
    ],
)
def test_requests_that_cannot_be_served_are_named(bad: RolloutRequest, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        check_requests([request(), bad], max_model_len=10, vocab_size=50)
    check_requests([request()], max_model_len=10, vocab_size=50)


def test_seeds_differ_in_every_argument() -> None:
    values = (1, 11, 111)  # whose digits say the same in other orders
    seeds = {request_seed(a, b, c, d) for a in values for b in values for c in values for d in values}
    assert len(seeds) == 81 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert request_seed(1, 2, 3, 4) == request_seed(1, 2, 3, 4)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": float("nan")}])
def test_sampling_is_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


def test_an_engine_names_what_is_wrong_with_its_model_before_it_starts(tmp_path: Path) -> None:
    settings: dict = {"dtype": "float32", "max_model_len": 16}
    with pytest.raises(EngineError, match=r"has no config\.json"):
        VllmEngine(EngineSettings(tmp_path, **settings))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="has no safetensors file"):
        VllmEngine(EngineSettings(tmp_path, **settings))
    with pytest.raises(EngineError, match="dtype is 'float8'"):
        EngineSettings(tmp_path, **(settings | {"dtype": "float8"}))


def test_the_engines_process_ends_when_the_trainer_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-m", "nemo_tropd.rollout.vllm", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )
    try:
        time.sleep(0.5)
        assert server.poll() is None
        ours.close()
        assert server.wait(timeout=120) != 0  # it may still be importing
    finally:
        server.kill()


OWNER = """
import os, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
command = [sys.executable, "-P", "-m", "nemo_tropd.rollout.vllm", str(theirs.fileno()), str(os.getpid())]
server = subprocess.Popen(command, pass_fds=(theirs.fileno(),), start_new_session=True)
theirs.close()
helper = os.fork()  # as a library may: it keeps the owner's end of the connection open
if helper:
    print(server.pid, helper, flush=True)
time.sleep(120)
"""


def test_the_engines_process_outlives_signals_but_not_its_owner(tmp_path: Path) -> None:
    """All the while it imports torch, which can take longer than a scheduler waits."""
    imports = tmp_path / "torch.py"
    imports.write_text("import pathlib, time\npathlib.Path(__file__).with_name('began').touch()\ntime.sleep(120)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=env)
    assert owner.stdout is not None
    server, helper = map(psutil.Process, map(int, owner.stdout.readline().split()))
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            server.send_signal(number)
        time.sleep(1.5)
        assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
        owner.kill()
        owner.wait()
        psutil.wait_procs([server], timeout=10)
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
        assert helper.is_running()
    finally:
        for process in (owner, server, helper):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        owner.wait()


def test_an_engine_has_ended_when_its_workers_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed, a worker with 70 GB of a GPU takes its time; the trainer would find that memory taken."""
    script = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('up', flush=True); input()"
    leader = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert leader.stdout is not None and leader.stdout.readline()
    members = session_members(leader.pid)
    assert leader.pid in members and len(members) == 2
    engine = VllmEngine(EngineSettings(make_tiny(tmp_path), dtype="float32", max_model_len=32))
    slow = [psutil.Process(pid) for pid in members if pid != leader.pid]
    asked: list[int] = []

    def dying(pid: int) -> list[int]:
        asked.append(pid)
        return [slow[0].pid] if len(asked) < 4 else session_members(pid)

    monkeypatch.setattr(child, "session_members", dying)
    engine._kill(leader)
    assert len(asked) >= 4 and set(asked) == {leader.pid}
    assert not session_members(leader.pid)
    leader.communicate()
