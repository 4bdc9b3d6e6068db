"""Bad settings are refused before anything is built, and the message says what to change."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_tropd import command_line
from nemo_tropd.command_line import compose_command_line
from nemo_tropd.config import ConfigError, TropdConfig, host_and_port, schema_fields, schema_keys
from nemo_tropd.config_checks import check, resolve
from nemo_tropd.config_keys import value_at
from tests.e2e.compose import CONF, compose_config

REQUIRED = ["pretrained_checkpoint.restore_from_path=s", "model.teacher.path=t", "model.data.path=d"]

# One of each kind of bad value; below, the keys that take it all the same. Every other key refuses it.
BAD = (math.nan, math.inf, -math.inf, -1, 0, 1.5, 1e39, 10**40, "", " ", "no such", True, None, [1], {"a": 1})
OPTIONAL = (
    "trainer.gpu_memory_gib trainer.rendezvous exp_manager.explicit_log_dir model.tropd.gate model.tropd.outlier "
    "model.tropd.tail model.tropd.guidance_weight model.tropd.chunk_tokens model.teacher.precision "
    "model.teacher.tensor_model_parallel_size model.teacher.response_tokens model.teacher.cache_dir model.teacher.fp8 "
    "model.rollout.dedicated.address model.rollout.dedicated.engines model.validation.max_new_tokens "
    "model.tokens_per_micro_batch model.recompute model.optim.sched.decay_steps model.tropd.guidance.anneal_steps "
    "model.data.system_prompt model.validation.benchmark_interval model.data.teacher_key model.data.teacher_prompt_key "
    "model.teacher.follow_steps model.teacher.url model.teacher.server.model model.tropd.guidance.enabled"
)
ZERO = (
    "trainer.max_restarts trainer.tropd.val_check_interval trainer.tropd.gradient_clip_val model.data.held_out "
    "trainer.tropd.max_skipped_steps model.optim.lr model.optim.weight_decay model.optim.sched.min_lr model.seed "
    "model.optim.sched.warmup_steps model.tropd.guidance.max_prefix_tokens model.tropd.guidance_weight "
    "model.teacher.admission.prompts model.teacher.admission.top_k_kl model.teacher.admission.gate_flips "
    "model.teacher.admission.ratio_error model.teacher.fp8_first_last_bf16 model.rollout.top_k "
    "model.validation.kept_rollouts model.validation.benchmark_interval model.rollout.steps_ahead"
)
FRACTION = (
    "trainer.gpu_memory_gib trainer.tropd.gradient_clip_val model.optim.lr model.optim.weight_decay model.optim.eps "
    "model.tropd.guidance_weight model.teacher.admission.top_k_kl model.teacher.admission.ratio_error "
    "model.rollout.dedicated.timeout_s model.rollout.temperature model.rollout.kv_cache_gib "
    "model.rollout.request_timeout_s model.teacher.server.timeout_s model.teacher.server.give_up_s "
    "model.teacher.server.noise"
)
FLAGS = (
    "check_only exp_manager.create_tensorboard_logger exp_manager.resume_if_exists model.tropd.guidance.enabled "
    "model.teacher.fp8_param model.teacher.offload model.teacher.offload_states model.teacher.score_early "
    "model.rollout.sleep model.rollout.dedicated.queue "
    "model.rollout.torch_compile model.data.chat_template "
    "model.validation.score_teacher"
)
TEXTS = (
    "name exp_manager.explicit_log_dir exp_manager.exp_dir pretrained_checkpoint.restore_from_path model.teacher.path "
    "model.teacher.cache_dir model.tropd.objective model.data.path model.data.prompt_key model.data.messages_key "
    "model.data.answer_key model.data.split model.data.chat_template model.data.system_prompt model.data.teacher_key "
    "model.data.teacher_prompt_key model.teacher.server.model"
)
LEGAL = {
    "None": OPTIONAL.split(),
    "0": ZERO.split(),
    "1.5": FRACTION.split(),
    "True": FLAGS.split(),
    "'no such'": TEXTS.split(),
    "[1]": ["model.rollout.end_tokens"],
    "{'a': 1}": ["exp_manager.wandb_logger_kwargs", "model.tropd.params", "model.data.chat_template_kwargs"],
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def read(*argv: str, conf: Path = CONF) -> TropdConfig:
    """What a command line comes to."""
    return resolve(compose_command_line(argv, conf))


def leaves() -> list[str]:
    return [key for key, field in schema_fields() if "check" in field.metadata]


def with_value(key: str, value: object) -> TropdConfig:
    cfg = TropdConfig(name="run")
    cfg.pretrained_checkpoint.restore_from_path, cfg.model.teacher.path, cfg.model.data.path = "s", "t", "d"
    *path, last = key.split(".")
    node: Any = cfg
    for name in path:
        node = getattr(node, name)
    setattr(node, last, value)
    return cfg


def test_every_leaf_of_the_schema_says_what_it_takes() -> None:
    sections = {key.rpartition(".")[0] for key in schema_keys()} - {
        "exp_manager.wandb_logger_kwargs",
        "model.data.chat_template_kwargs",
        "model.teachers",
    }
    assert {key for key, _ in schema_fields()} - set(leaves()) == sections - {"", "model.tropd.params"}
    check(with_value("name", "run"))  # every default


@pytest.mark.parametrize("key", leaves())
def test_every_key_refuses_bad_values_of_every_kind(key: str) -> None:
    refused = 0
    for value in BAD:
        if key in LEGAL.get(repr(value), ()):
            check(with_value(key, value))
            continue
        with pytest.raises(ConfigError) as caught:
            check(with_value(key, value))
        refused += 1
        assert caught.value.key == key or key in caught.value.remedy, value
        assert repr(caught.value.value) == repr(value) or caught.value.key != key
        assert re.search(r"\b(give|choose|must|set|needs)\b", caught.value.remedy), caught.value.remedy
    assert refused >= 9


def test_the_table_of_legal_values_names_known_keys() -> None:
    assert {key for keys in LEGAL.values() for key in keys} <= set(leaves())
    assert set(LEGAL) <= {repr(value) for value in BAD}


@pytest.mark.parametrize(
    "override",
    [
        "model.optim.lr=nan", "model.optim.lr=true", "model.optim.lr=null", "trainer.tropd.max_steps=true",
        "trainer.tropd.max_steps=1e3", "trainer.tropd.max_steps=ten", "model.optim.betas=[2,3]",
        "model.optim.betas=[0.9]", "model.optim.betas=(2,3)", "model.sequence_parallel=2", "name=", "name=null",
        "name=../../x", "name=a/b", "name=/x", "name=..", "model.seed=[1]", "model.seed=4294967296", "model.seed=1,2",
        "model.seed=${nothing}", "model.seed=${oc.env:NO_SUCH_VARIABLE}", "model.seed=${", "model.optim=3",
        "model.optim=null", "model.tropd.params=3", "model.tropd.params={tau:nan}", "model.recompute=whole",
        "trainer.rendezvous=node:port", "model.rollout.temperature=2.5", "model.data.path=a=b", "~model.seed",
        "model.rollout.end_tokens=3", "model.data.chat_template_kwargs=3",
    ],
)  # fmt: skip
def test_the_command_line_refuses_a_value_by_its_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*REQUIRED, override)
    assert caught.value.key == override.lstrip("~").partition("=")[0]
    assert str(caught.value).count("\n") == 0 and len(caught.value.remedy) > 10


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_file_composes_and_passes(path: Path) -> None:
    required = REQUIRED if path.stem in ("base", "gpu") else []
    if path.stem == "gpu":
        required = [*required, "name=gpu"]
    assert read("--config-name", path.stem, *required).name


@pytest.mark.parametrize("module", ["command_line", "config_checks", "fields", "launch.command", "planner.wire"])
def test_checking_imports_no_torch(module: str) -> None:
    code = f"import sys, nemo_tropd.{module}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent, timeout=60)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_unknown_key_names_the_near_one(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.lr = '3': .*did you mean model\.optim\.lr\?"):
        read(f"{prefix}model.lr=3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  tropd:\n    topk: 3\n", r"model\.tropd\.topk = 3: bad\.yaml sets it.*did you mean .*top_k"),
        ("model:\n  optim:\n    lr: fast\n", r"model\.optim\.lr = 'fast': bad\.yaml: give a finite number"),
        ("model:\n  optim: 3\n", r"model\.optim = 3: bad\.yaml: is a section: set its keys"),
        ("- a\n", r"--config-name = 'bad': .*must be a DictConfig"),
        ("a: [\n", r"--config-name = 'bad': .*bad\.yaml\", line"),
        ("name: a\nname: b\n", r"--config-name = 'bad': .*duplicate key name"),
    ],
)
@pytest.mark.parametrize("base", ["", "defaults:\n  - base\n  - _self_\n"])
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str, base: str) -> None:
    (tmp_path / "bad.yaml").write_text(text if text[0] == "-" else base + text)
    with pytest.raises(ConfigError, match=message):
        read("--config-dir", str(tmp_path), "--config-name", "bad", *REQUIRED)


def test_free_form_keys_are_allowed() -> None:
    cfg = read(*REQUIRED, "+model.tropd.params.tau=-2", "exp_manager.wandb_logger_kwargs.project=x")
    assert cfg.model.tropd.params == {"tau": -2} and cfg.exp_manager.wandb_logger_kwargs == {"project": "x"}


def test_missing_file_lists_those_there_are(tmp_path: Path) -> None:
    for name, why in (("nope", "smollm2_cpu"), ("n" * 256, "cannot be composed: .*name too long")):
        with pytest.raises(ConfigError, match=rf"^--config-name = '{name}': .*{why}"):
            read("--config-name", name)
    (tmp_path / "mine.yaml").write_text("defaults: [nope]\n")
    with pytest.raises(ConfigError, match=r"'nope': named in the defaults of mine\.yaml.*smollm2_cpu"):
        read("-cd", str(tmp_path), "-cn", "mine")


def test_folders_beside_and_instead_of_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [smollm2_cpu, _self_]\nname: mine\n")
    assert read("model.seed=5", "--config-dir", str(tmp_path), "-cn", "mine.yaml", "check_only=true").model.seed == 5
    (tmp_path / "base.yaml").write_text("defaults: [tropd_schema, _self_]\nname: alone\n")
    assert read("--config-path", str(tmp_path), *REQUIRED).name == "alone"
    for flag in ("--config-dir", "--config-path"):
        for nowhere in ("/nowhere", "/" + "a" * 256):
            with pytest.raises(ConfigError, match=rf"^{flag} = '{nowhere}': there is no such directory"):
                read(flag, nowhere)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--multirun", "model.seed=1,2"], "'--multirun': a command is one run"),
        (["--cfg", "hydra"], "give --cfg job"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--config-name"], "expected one argument"),
        (["word"], "'word': it takes key=value"),
        (["=3"], "'=3': it takes key=value"),
        (["hydra.run.dir=x"], r"^hydra\.run\.dir = 'x': Hydra's own settings"),
        (["model/optim=x"], r"^model/optim = 'x': there is no such key"),
    ],
)
def test_what_a_command_line_cannot_say(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(*argv)


def test_help_and_the_composed_configuration_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            compose_command_line(argv, CONF, usage="How to use it.")
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert "How to use it." in shown("--help") and "smollm2_cpu" in shown("-h")
    assert "lr: 0.25" in shown("--cfg", "job", "model.optim.lr=0.25", "--config-name", "gpu")
    with pytest.raises(ConfigError):
        compose_command_line(["--cfg", "job", "model.lr=1"], CONF)


def test_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match="restore_from_path"):
        compose_config(REQUIRED[1:])


@pytest.mark.parametrize(
    ("override", "named", "remedy"),
    [
        ("trainer.precision=fp16", "trainer.precision", "choose one of"),
        ("model.tropd.gate=hard", "model.tropd.gate", "bernoulli"),
        ("trainer.tropd.max_steps=0", "trainer.tropd.max_steps", "at least 1"),
        ("model.tensor_model_parallel_size=3", "model.tensor_model_parallel_size", "does not divide the 1 processes"),
        ("model.sequence_parallel=true", "model.sequence_parallel", "above 1"),
        ("model.global_batch_size=6", "model.global_batch_size", "samples_per_prompt = 4"),
        ("model.optim.distributed=true", "model.optim.distributed", "data-parallel"),
        ("model.encoder_seq_length=100", "model.encoder_seq_length", "need 9120"),
        ("model.rollout.temperature=0", "model.rollout.temperature", "at least 0.01"),
        ("model.rollout.top_p=1.5", "model.rollout.top_p", "above 0 and at most 1"),
        ("model.rollout.top_p=0.95", "model.rollout.top_p", "set model.rollout.top_k too (at most 1024"),
        ("model.rollout.top_k=1025", "model.rollout.top_k", "at most 1024"),
        ("model.rollout.top_k=-1", "model.rollout.top_k", "at least 0"),
        ("model.rollout.request_timeout_s=9999", "model.rollout.request_timeout_s", "distributed_timeout_s"),
        ("model.tropd.guidance.max_prefix_tokens=9000", "max_prefix_tokens", "at most 8096"),
        ("model.tropd.guidance.anneal_fraction=1.5", "anneal_fraction", "above 0 and at most 1"),
        ("model.optim.sched.min_lr=1", "model.optim.sched.min_lr", "model.optim.lr = 5e-06"),
        ("model.optim.sched.warmup_steps=200", "model.optim.sched.warmup_steps", "max_steps = 200"),
        ("model.rollout.max_num_seqs=9217", "model.rollout.max_num_seqs", "at most 9216"),
        ("model.validation.max_new_tokens=8193", "model.validation.max_new_tokens", "lower it to 8192"),
        ("model.teacher.response_tokens=8193", "model.teacher.response_tokens", "lower it to 8192"),
        ("trainer.distributed_timeout_s=3000", "model.rollout.request_timeout_s", "distributed_timeout_s = 3000"),
        ("exp_manager.exp_dir=null", "exp_manager.exp_dir", "explicit_log_dir"),
        ("exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs", "project"),
        ("model.data.overlong=cut", "model.data.overlong", "drop"),
        ("model.data.template_date=yesterday", "model.data.template_date", "give a date, such as 2024-07-26"),
        ("model.data.template_date=20240726", "model.data.template_date", "give a date"),
        ("model.rollout.end_tokens=[1.5]", "model.rollout.end_tokens", "give a list of texts or ids"),
        ("model.rollout.end_tokens=[-1]", "model.rollout.end_tokens", "give a list of texts or ids"),
        ("model.data.chat_template=3", "model.data.chat_template", "true, false or a string"),
        ("model.data.path=null", "model.data.path", "set model.data.sources"),
        ("model.teacher.url=host:8000", "model.teacher.url", "give http://HOST:PORT"),
        ("model.teacher.url='http://h:8000?key=1'", "model.teacher.url", "give http://HOST:PORT"),
        ("model.teacher.url='http://xn--a.com'", "model.teacher.url", "give http://HOST:PORT"),
        ("model.teacher.url='http://a..b:8000'", "model.teacher.url", "give http://HOST:PORT"),
        ("model.teacher.url='http://h:99999'", "model.teacher.url", "give http://HOST:PORT"),
    ],
)
def test_impossible_settings(override: str, named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([*REQUIRED, override])
    assert named in str(caught.value) and remedy in str(caught.value)
    assert override.split("=")[1].strip("'").replace("null", "none") in str(caught.value).lower()


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        *((f"model.teacher.{key}", value, "leaves the teacher to servers.*set it to null") for key, value in (
            ("fp8", "blockwise"), ("precision", "bf16"), ("tensor_model_parallel_size", 1), ("follow_steps", 5),
        )),
        ("model.teacher.offload", True, "set it to false"),
        ("model.rollout.temperature", 0.7, "temperature 1 alone"),
        ("model.teacher.server.give_up_s", 3600, "below trainer.distributed_timeout_s = 3600"),
    ],
)  # fmt: skip
def test_what_a_teacher_behind_a_server_excludes(key: str, value: object, remedy: str) -> None:
    urls = "['http://a:8000/v1//','http://b//v1','https://[::1]:8001']"
    assert compose_config([*REQUIRED, f"model.teacher.url={urls}"]).model.teacher.urls == [
        "http://a:8000",
        "http://b",
        "https://[::1]:8001",
    ]
    with pytest.raises(ConfigError, match=remedy) as caught:
        compose_config([*REQUIRED, f"model.teacher.url={urls}", f"{key}={value}"])
    assert caught.value.key == key
    with pytest.raises(ConfigError, match="give http://HOST:PORT"):
        compose_config([*REQUIRED, "model.teacher.url='http://a\u200bb:8000'"])  # what is not seen
    named = ["+model.teachers.code.path=c", "model.data.teacher_key=t", "+model.teachers.code.url='http://me:pw@h'"]
    with pytest.raises(ConfigError, match="would be shown: set NEMO_TROPD_TEACHER_TOKEN") as caught:
        compose_config([*REQUIRED, *named])
    assert "pw@" not in str(caught.value)


def test_a_home_directory_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "pretrained_checkpoint.restore_from_path": "~/a",
        "model.teacher.path": "~",
        "model.teacher.cache_dir": "~/c",
        "exp_manager.exp_dir": "~/runs",
        "exp_manager.explicit_log_dir": "~no-such-user/x",
    }
    cfg = compose_config(["model.data.path=d", *(f"{key}='{value}'" for key, value in given.items())])
    assert [value_at(cfg, key) for key in given] == [
        *("/home/me/a", "/home/me", "/home/me/c", "/home/me/runs", "~no-such-user/x")
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["engines=2"], r"dedicated\.address = None: .*needs host:port where rank 0 listens"),
        (["address=10.0.0.1:29600"], r"dedicated\.engines = None: .*needs the number of engine hosts"),
        (["address=10.0.0.1:29600", "engines=0"], r"dedicated\.engines = 0: give an integer of at least 1"),
        (["address=10.0.0.1", "engines=1"], r"dedicated\.address = '10\.0\.0\.1': must be host:port"),
        (["address=node1:70000", "engines=1"], r"dedicated\.address = 'node1:70000': must be host:port with a port"),
        (["address=a:1", "engines=1", "timeout_s=0"], r"dedicated\.timeout_s = 0\.0: give a number above 0"),
        (["address=a:1", "engines=1", "timeout_s=3600"], r"dedicated\.timeout_s = 3600\.0: .*distributed_timeout_s"),
    ],
)
def test_engines_on_hosts_of_their_own_need_a_place_and_a_number(keys: list[str], message: str) -> None:
    given = [f"model.rollout.dedicated.{key}" for key in keys]
    with pytest.raises(ConfigError, match=message):
        compose_config([*REQUIRED, "model.rollout.placement=dedicated", *given])
    if len(keys) == 1 or "timeout_s=3600" in keys:
        compose_config([*REQUIRED, *given])  # not read with another placement


@pytest.mark.parametrize(("text", "parts"), [("n1:9", ("n1", 9)), ("[::1]:65535", ("::1", 65535))])
def test_an_address_is_host_and_port(text: str, parts: tuple[str, int]) -> None:
    assert host_and_port("key", text) == parts
    for bad in ("", ":9", "n1:", "n1:0", "n1:x", "::1:9", "a b:9"):
        with pytest.raises(ConfigError, match=f"^key = {re.escape(repr(bad))}: must be host:port"):
            host_and_port("key", bad)


def test_the_distributed_optimizer_is_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [*REQUIRED, "trainer.devices=2", "model.optim.distributed=true"]
    assert compose_config(two).model.optim.distributed
    with pytest.raises(ConfigError, match=r"^model\.optim\.name = 'sgd': .* is adam only: .*distributed=false"):
        compose_config([*two, "model.optim.name=sgd"])


def test_launched_processes_must_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        compose_config(REQUIRED)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE = 'two': .* must be a number"):
        compose_config(REQUIRED)


def test_every_key_has_a_default_or_is_required() -> None:
    cfg = compose_config(REQUIRED)
    assert cfg.model.tropd.top_k == 64 and cfg.model.optim.lr == 5e-6 and cfg.trainer.tropd.max_steps == 200
    assert "model.tropd.guidance.max_prefix_tokens" in set(schema_keys())


def train(*words: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "examples/train_tropd.py", *words],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line_ends_with_code_2_and_no_traceback() -> None:
    done = train("model.optim.learning_rate=1")
    assert done.returncode == 2
    assert "ConfigError: model.optim.learning_rate = '1'" in done.stderr and "Traceback" not in done.stderr
    done = train("--config-name", "smollm2_cpu", "model.tropd.chunk_tokens=-5", "check_only=true")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "ConfigError: model.tropd.chunk_tokens = -5: give an integer of at least 1, or null"


SOURCES = "model.data.sources"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{path: a, weight: -1}]", r"sources = .*\[0\]\.weight = -1: give a number above 0"),
        ("[{path: a}, {path: b, weight: 0}]", r"\[1\]\.weight = 0: give a number above 0"),
        ("[{path: a, weight: inf}]", r"\[0\]\.weight = inf: give a finite number above 0"),
        ("[{path: a, weight: heavy}]", r"\[0\]\.weight = 'heavy': give a finite number above 0"),
        ("[{path: ''}]", r"\[0\]\.path = '': give a string that is not empty"),
        ("[{weight: 1}]", r"\[0\]\.path = None: give a string that is not empty"),
        ("[{path: a, wieght: 1}]", r"\[0\]\.wieght: there is no such key; choose of path, weight, prompt_key"),
        ("[a.jsonl]", r"sources = \['a\.jsonl'\]: give a list of dictionaries with the keys path, weight, prompt_key"),
        ("a.jsonl", r"sources = 'a\.jsonl': give a list of dictionaries with the keys path, weight"),
        ("[{path: a, prompt_key: ''}]", r"\[0\]\.prompt_key = '': give a string that is not empty, or null"),
    ],
)
def test_bad_sources_are_refused_by_their_key(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(*REQUIRED[:2], f"{SOURCES}={value}")
    assert str(caught.value).startswith(SOURCES) and "\n" not in str(caught.value)


def test_path_and_sources_exclude_each_other() -> None:
    both = read(*REQUIRED[:2], f"{SOURCES}=[{{path: a, weight: 2}}, {{path: b}}]").model.data.sources
    assert both == [{"path": "a", "weight": 2}, {"path": "b"}]
    for args in ((*REQUIRED, f"{SOURCES}=[{{path: a}}]"), REQUIRED[:2]):
        with pytest.raises(ConfigError, match=r"^model\.data\.path = .*model\.data\.sources"):
            read(*args)


def test_rank_0_alone_says_what_is_wrong_under_torchrun() -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = train("model.lr=3", launcher=launcher)
    assert done.returncode != 0
    assert len(re.findall("ConfigError: model.lr = '3'", done.stderr)) == 1, done.stderr


def test_another_rank_speaks_only_if_rank_0_has_nothing_to_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    own = threading.get_ident()  # what other threads of the process wait is none of this
    monkeypatch.setattr(
        command_line.time, "sleep", lambda s: waited.append(s) if threading.get_ident() == own else None
    )
    error = ConfigError("model.data.path", "/x", "there is none on this node")
    for rank, said in (("0", "\nConfigError: "), ("3", "\nrank 3: ConfigError: ")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught:
            command_line.fail(error)
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"{said}{error}\n"
    assert sum(waited) == pytest.approx(15)
    monkeypatch.setattr(command_line.STOP, "signal", signal.SIGTERM)  # torchrun's, while this rank still imported
    with pytest.raises(SystemExit) as caught:
        command_line.fail(error)
    assert (caught.value.code, capsys.readouterr().err, sum(waited)) == (2, "", pytest.approx(15))
