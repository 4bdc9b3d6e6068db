"""Files and texts from strangers: nothing of them runs, is obeyed by a terminal, or ends a run without a name."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from examples.convert_checkpoint import hf_to_megatron, megatron_to_hf
from nemo_tropd.command_line import fail, printable
from nemo_tropd.convert.families import ConversionError, read_shape
from nemo_tropd.convert.folders import copy_sidecar
from nemo_tropd.convert.hf_files import INDEX, HfCheckpoint
from nemo_tropd.convert.metadata_file import read_metadata, without_code
from nemo_tropd.data import PromptError, load_prompts
from nemo_tropd.parallel.roll_call import failed_collective
from nemo_tropd.parallel.topology import Topology
from nemo_tropd.report.records import read_run
from nemo_tropd.rollout.engine import EngineError
from nemo_tropd.rollout.weights import senders
from nemo_tropd.training.checkpoint import CheckpointError, Checkpoints
from nemo_tropd.training.progress import RunProgress
from nemo_tropd.training.run import make_lightning_trainer
from nemo_tropd.training.summary import print_summary
from tests.e2e.compose import compose_config
from tests.e2e.tiny_run import TinyRun
from tests.tiny_models import make_tiny
from tests.unit.test_checkpoint import STATE
from tests.unit.test_optimizer import Student

Header = dict[str, Any]


def edited(**changes: object) -> Callable[[Header, str, str], bytes]:
    """The header with other fields for its first tensor; ``like`` takes the second tensor's place in the file."""

    def edit(header: Header, first: str, second: str) -> bytes:
        made = copy.deepcopy(header)
        made[first].update(changes)
        if changes.get("data_offsets") == "second":
            made[first]["data_offsets"] = header[second]["data_offsets"]
        elif isinstance(changes.get("data_offsets"), tuple):
            begin, end = header[first]["data_offsets"]
            made[first]["data_offsets"] = [begin + changes["data_offsets"][0], end + changes["data_offsets"][1]]
        return json.dumps(made).encode()

    return edit


def text(content: bytes) -> Callable[[Header, str, str], bytes]:
    return lambda *_: content


def twice(header: Header, first: str, second: str) -> bytes:
    return json.dumps(header).encode()[:-1] + f",{json.dumps(first)}:{json.dumps(header[second])}}}".encode()


HEADERS: dict[str, Callable[[Header, str, str], bytes]] = {
    "negative offsets": edited(data_offsets=[-64, 0]),
    "overlap": edited(data_offsets="second"),
    "fewer bytes than the shape": edited(data_offsets=(0, -4)),
    "a gap": edited(data_offsets=(1, 1)),
    "fractions": edited(data_offsets=[0.5, 4.5]),
    "huge offsets": edited(data_offsets=[2**70, 2**71]),
    "huge shape": edited(shape=[2**40, 2**40]),
    "negative shape": edited(shape=[-1]),
    "wider dtype": edited(dtype="F64"),
    "unknown dtype": edited(dtype="F99"),
    "a tensor twice": twice,
    "list": text(b"[]"),
    "number": text(b"7"),
    "nested list": text(b"[" * 60_000),
    "nested object": text(b'{"a":' * 50_000),
    "no UTF-8": text(b"\xff\xfe{}"),
    "metadata is a list": lambda header, *_: json.dumps({**header, "__metadata__": [1]}).encode(),
    "more than 100 MB": lambda header, *_: json.dumps(header).encode() + b" " * (101 * 10**6),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("strangers") / "hf", layers=1)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused_with_file_and_remedy(model: Path, what: str) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    by_place = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    made = HEADERS[what](header, by_place[0], by_place[1])
    file.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + size :])
    with pytest.raises(ConversionError, match=r"model\.safetensors") as caught:
        HfCheckpoint(model, read_shape(model))
    assert "download" in str(caught.value)


@pytest.mark.parametrize("size", [2**63, 10**12, 0])
def test_a_header_of_an_impossible_size_is_refused(model: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    with pytest.raises(ConversionError, match=r"model\.safetensors is damaged"):
        HfCheckpoint(model, read_shape(model))


@pytest.mark.parametrize(
    "name", ["../model/model.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "x" * 5000, "sub/x", "config.json", 7]
)
def test_an_index_names_weight_files_of_its_own_folder_alone(model: Path, name: object) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ConversionError, match="model"):
        HfCheckpoint(model, read_shape(model))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"", b"null", b'{"weight_map": {"a": {}}}'])
def test_an_index_that_is_none_is_refused(model: Path, content: bytes) -> None:
    (model / INDEX).write_bytes(content)
    with pytest.raises(ConversionError, match=INDEX):
        HfCheckpoint(model, read_shape(model))


def test_json_nested_too_deeply_is_named_by_its_file(model: Path, tmp_path: Path) -> None:
    nested, tokenizer = "[" * 100_000, AutoTokenizer.from_pretrained(model)
    (model / "config.json").write_text(nested)
    with pytest.raises(ConversionError, match=r"config\.json is not valid JSON"):
        read_shape(model)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(nested + "\n")
    with pytest.raises(PromptError, match=r"record 1: .* nested too deeply"):
        load_prompts(str(prompts), tokenizer, max_prompt_tokens=9, held_out=0)
    (tmp_path / "summary.json").write_text(nested)
    (tmp_path / "metrics.jsonl").write_text(nested + '\n{"step": 1, "kind": "train", "loss": 1.0}\n')
    assert any("summary.json is unreadable" in note for note in read_run(tmp_path).notes)


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_no_code_of_a_checkpoint_runs(model: Path, tmp_path: Path, topology: Topology) -> None:
    """Not in the conversion, not on resume; neither from .metadata nor from an object beside the weights."""
    checkpoint, mark = tmp_path / "megatron", tmp_path / "mark"
    hf_to_megatron(model, checkpoint)
    checkpoints = Checkpoints(tmp_path / "run", topology, hf_source=model, keep=2)
    trained = Student(model, topology)
    trained.step(0)
    saved = checkpoints.save(trained.ddp.module, trained.optimizer, STATE)
    assert checkpoints.load(saved, trained.ddp.module, trained.optimizer) == STATE
    dotted = pickle.dumps(torch.Size, protocol=4).replace(b"\x8c\x04Size", b"\x8c\x0dSize.__init__")
    good = (checkpoint / ".metadata").read_bytes()
    for content in (
        pickle.dumps(Payload(mark)),
        good[:-1] + pickle.dumps(Payload(mark)),
        dotted,
        b"",
        good[:99],
        b"\x80",
    ):
        for folder in (checkpoint, saved):
            (folder / ".metadata").write_bytes(content)
        if content.startswith(good[:-1]):  # what comes last is what is loaded
            assert pickle.loads(content) == 0 and mark.exists()
            mark.unlink()
        with pytest.raises(ConversionError, match=r"\.metadata cannot be used .* from a source that you trust"):
            megatron_to_hf(checkpoint, tmp_path / "back")
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be used"):
            checkpoints.load(saved, trained.ddp.module, trained.optimizer)
        assert not mark.exists()


class Attribute:
    """getattr(of, name) where it is unpickled."""

    def __init__(self, of: object, name: str) -> None:
        self.arguments = of, name

    def __reduce__(self) -> Any:
        return getattr, self.arguments


def test_members_of_enumerations_are_read_as_any_python_writes_them(model: Path, tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3 do, Debian 12's among them: by getattr, which gives nothing else here."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorProperties

    checkpoint = tmp_path / "megatron"
    hf_to_megatron(model, checkpoint)
    path = checkpoint / ".metadata"
    good = pickle.loads(path.read_bytes())

    class Writer(pickle._Pickler):
        def reducer_override(self, value: Any) -> Any:
            return (getattr, (type(value), value.name)) if isinstance(value, _MEM_FORMAT_ENCODING) else NotImplemented

    with path.open("wb") as file:
        Writer(file).dump(good)
    assert b"getattr" in path.read_bytes()
    assert read_metadata(checkpoint) == good
    for of, name in (
        (TensorProperties, "__init__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (Metadata, "__class__"),
        (1, "real"),
    ):
        path.write_bytes(pickle.dumps(Attribute(of, name)))
        with pytest.raises(ConversionError, match=f"it has '{name}' of .*which could run code"):
            read_metadata(checkpoint)


def test_an_object_beside_the_weights_cannot_run_code(tmp_path: Path, topology: Topology, model: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    folder, mark = tmp_path / "objects", tmp_path / "mark"
    folder.mkdir()

    def state(value: object) -> dict[str, Any]:
        return {"x": ShardedObject("x", value, (1,), (0,)), "y": 1}

    dist_checkpointing.save(state(Payload(mark)), str(folder))
    with pytest.raises(BaseException, match=r"(?i)weights.only"), without_code(folder):  # CheckpointException
        dist_checkpointing.load(state(None), str(folder))
    assert not mark.exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    shutil.rmtree(folder)
    folder.mkdir()
    dist_checkpointing.save(state({"lr": 0.5, "steps": [1, 2]}), str(folder))
    with without_code(folder):
        assert dist_checkpointing.load(state(None), str(folder))["x"] == {"lr": 0.5, "steps": [1, 2]}


def test_metadata_names_files_of_its_own_folder_alone(model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "megatron"
    hf_to_megatron(model, checkpoint)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../megatron/__0_0.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConversionError, match="must name files of its own folder"):
        megatron_to_hf(checkpoint, tmp_path / "back")


def test_another_users_bucket_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "nemo_tropd-weights-4194399-x.safetensors"
    stale.write_bytes(b"x")
    os.utime(stale, (1, 1))
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    senders.SharedMemory(tmp_path)
    assert stale.exists()
    monkeypatch.undo()
    senders.SharedMemory(tmp_path)
    assert not stale.exists()


HOSTILE = "[INST] [/etc/passwd] [/INST] :smile: [bold]\x1b]0;title\x07\x1b[2J\x9b31m\u202e\rend"
SHOWN = r"[INST] [/etc/passwd] [/INST] :smile: [bold]\x1b]0;title\x07\x1b[2J\x9b31m\u202e\rend"


def test_text_from_data_is_printed_as_it_is_and_obeyed_by_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("ä 一\n\tb") == "ä 一\n\tb" and printable(HOSTILE) == SHOWN
    answer = {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    print_summary(
        {"name": "[/x]", "steps": 1, "before": {"reverse_kl": 2.0}, "after": {"reverse_kl": 1.0}, "answers": [answer]}
    )
    out = capsys.readouterr().out.replace("\n", "")
    assert out.count("[/INST] :smile: [bold]\\x1b]0;title") == 3 and "[/x]: held-out" in out
    RunProgress(enabled=True, first=0, total=1).say(HOSTILE)
    live = RunProgress(enabled=False, first=0, total=1)
    live.console = Console(file=io.StringIO(), width=200, markup=live.console._markup, emoji=live.console._emoji)
    live.live, live._bar = True, type("Bar", (), {"console": live.console})
    live.say(HOSTILE)
    with pytest.raises(SystemExit):
        fail(EngineError(HOSTILE))
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, live.console.file.getvalue()):
        assert SHOWN in text and "\x1b" not in text


def test_secrets_are_in_no_file_of_a_run_and_a_resumed_run_keeps_its_wandb_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"WANDB_API_KEY": "key-0123456789", "NEMO_TROPD_SECRET": "s3cret-98765", "MY_NOTE": "note-4711-x"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = "exp_manager.wandb_logger_kwargs"
    overrides = [
        *TinyRun.at(tmp_path).overrides(tmp_path / "run"),
        "exp_manager.create_wandb_logger=true",
        f"++{wandb}.project=p",
        f"++{wandb}.notes=${{oc.env:MY_NOTE}}",
        f"++{wandb}.group=xkey-0123456789x",
        f"++{wandb}.settings={{api_key:plain-value}}",
        "name=tokens",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides, "a=s3cret-98765", "name=note-4711-x"])
    ids = []
    cfg = compose_config(overrides)
    for _ in range(2):
        (logger,) = [x for x in make_lightning_trainer(cfg, tmp_path / "run").loggers if "Wandb" in type(x).__name__]
        ids.append(logger.version)
    assert ids[0] and ids[0] == ids[1]
    assert cfg.exp_manager.wandb_logger_kwargs["notes"] == "note-4711-x" and "a=s3cret-98765" in sys.argv
    written = "\n".join(p.read_text(errors="replace") for p in (tmp_path / "run").rglob("*") if p.is_file())
    for secret in (*values.values(), "plain-value"):
        assert secret not in written, secret
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "notes: ${oc.env:MY_NOTE}" in config and "api_key: '***'" in config and "name: tokens" in config
    assert "max_new_tokens: 12" in config and "argv" not in config


def test_an_error_that_quotes_a_library_is_no_lost_peer() -> None:
    quoted = EngineError("the engine died; last lines of its log: NCCL version 2.27, gloo transport")
    assert not failed_collective(quoted) and not failed_collective(CheckpointError("/data/gloo/run cannot be read"))
    assert failed_collective(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    try:
        raise quoted from RuntimeError("[gloo/transport/tcp/pair.cc] Connection reset")
    except EngineError as error:
        assert failed_collective(error)


def test_a_folders_other_files_travel_with_the_model_and_the_trainers_do_not(model: Path, tmp_path: Path) -> None:
    templates = model / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    for name in ("adapter_config.json", "trainer_state.json", "LICENSE"):
        (model / name).write_text("{}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", "dtype": "float16"}))
    copy_sidecar(model, tmp_path / "out", torch.bfloat16)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["torch_dtype"] == made["dtype"] == "bfloat16"
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert {"tool_use.jinja", "LICENSE", "tokenizer.json"} <= names
    assert not names & {"adapter_config.json", "trainer_state.json", "model.safetensors"}
