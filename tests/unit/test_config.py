"""Bad settings are refused before anything is built, and the message says what to change."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_tropd.config import ConfigError, host_and_port, schema_keys
from nemo_tropd.config_checks import check_command_line, check_file, check_overrides
from tests.e2e.compose import CONF, compose_config

REQUIRED = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_file_holds_only_known_keys(path: Path) -> None:
    check_file(path)
    if path.stem not in ("base", "gpu"):
        assert compose_config([], path.stem).name


def test_config_imports_no_torch() -> None:
    code = "import sys, nemo_tropd.config_checks; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent, timeout=60)


def test_unknown_key_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"model\.lr = '3'.*did you mean model\.optim\.lr"):
        check_overrides(["model.lr=3"])


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  tropd:\n    topk: 3\n")
    with pytest.raises(ConfigError, match=r"model\.tropd\.topk = 3: bad\.yaml sets it.*top_k"):
        check_file(tmp_path / "bad.yaml")


def test_free_form_keys_are_allowed() -> None:
    check_overrides(["+model.tropd.params.tau=-2", "exp_manager.wandb_logger_kwargs.project=x"])


def test_wrong_type_names_key_and_value() -> None:
    with pytest.raises(ConfigError, match=r"model\.optim\.lr = 'abc'"):
        check_command_line(["model.optim.lr=abc"], CONF)


def test_missing_file_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="smollm2_cpu"):
        check_command_line(["--config-name", "nope"], CONF)


def test_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match="restore_from_path"):
        compose_config(REQUIRED[1:])


@pytest.mark.parametrize(
    ("override", "named", "remedy"),
    [
        ("trainer.precision=fp16", "trainer.precision", "choose one of"),
        ("model.tropd.gate=hard", "model.tropd.gate", "'bernoulli'"),
        ("trainer.tropd.max_steps=0", "trainer.tropd.max_steps", "at least 1"),
        ("model.tensor_model_parallel_size=3", "model.tensor_model_parallel_size", "does not divide the 1 processes"),
        ("model.sequence_parallel=true", "model.sequence_parallel", "above 1"),
        ("model.global_batch_size=6", "model.global_batch_size", "samples_per_prompt = 4"),
        ("model.optim.distributed=true", "model.optim.distributed", "data-parallel"),
        ("model.encoder_seq_length=100", "model.encoder_seq_length", "need 9120"),
        ("model.rollout.temperature=0", "model.rollout.temperature", "above 0"),
        ("model.rollout.top_p=1.5", "model.rollout.top_p", "(0, 1]"),
        ("model.rollout.request_timeout_s=9999", "model.rollout.request_timeout_s", "distributed_timeout_s"),
        ("model.tropd.guidance.max_prefix_tokens=9000", "max_prefix_tokens", "at most 8096"),
        ("model.tropd.guidance.anneal_fraction=1.5", "anneal_fraction", "(0, 1]"),
        ("model.data.overlong=cut", "model.data.overlong", "'drop'"),
    ],
)
def test_impossible_settings(override: str, named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([*REQUIRED, override])
    assert named in str(caught.value) and remedy in str(caught.value)
    assert str(override.split("=")[1]).lower() in str(caught.value).lower()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["engines=2"], r"dedicated\.address = None: .*needs host:port where rank 0 listens"),
        (["address=10.0.0.1:29600"], r"dedicated\.engines = None: .*needs the number of engine hosts"),
        (["address=10.0.0.1:29600", "engines=0"], r"dedicated\.engines = 0: must be at least 1"),
        (["address=10.0.0.1", "engines=1"], r"dedicated\.address = '10\.0\.0\.1': must be host:port"),
        (["address=node1:70000", "engines=1"], r"dedicated\.address = 'node1:70000': must be host:port with a port"),
        (["address=a:1", "engines=1", "timeout_s=0"], r"dedicated\.timeout_s = 0\.0: must be above 0 and below"),
        (["address=a:1", "engines=1", "timeout_s=3600"], r"dedicated\.timeout_s = 3600\.0: .*distributed_timeout_s"),
    ],
)
def test_engines_on_hosts_of_their_own_need_a_place_and_a_number(keys: list[str], message: str) -> None:
    given = [f"model.rollout.dedicated.{key}" for key in keys]
    with pytest.raises(ConfigError, match=message):
        compose_config([*REQUIRED, "model.rollout.placement=dedicated", *given])
    if not any("timeout_s" in key for key in keys):
        compose_config([*REQUIRED, *given])  # not read with another placement


@pytest.mark.parametrize(("text", "parts"), [("n1:9", ("n1", 9)), ("[::1]:65535", ("::1", 65535))])
def test_an_address_is_host_and_port(text: str, parts: tuple[str, int]) -> None:
    assert host_and_port("key", text) == parts
    for bad in ("", ":9", "n1:", "n1:0", "n1:x", "::1:9", "a b:9"):
        with pytest.raises(ConfigError, match=f"^key = {re.escape(repr(bad))}: must be host:port"):
            host_and_port("key", bad)


def test_launched_processes_must_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        compose_config(REQUIRED)


def test_every_key_has_a_default_or_is_required() -> None:
    cfg = compose_config(REQUIRED)
    assert cfg.model.tropd.top_k == 64 and cfg.model.optim.lr == 5e-6 and cfg.trainer.tropd.max_steps == 200
    assert "model.tropd.guidance.max_prefix_tokens" in set(schema_keys())


def test_command_line_ends_with_code_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "examples/train_tropd.py", "model.optim.learning_rate=1"],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "ConfigError: model.optim.learning_rate = '1'" in done.stderr and "Traceback" not in done.stderr
