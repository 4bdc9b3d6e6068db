"""The settings of an evaluation: a file for each benchmark, or for a list of them, and what the command line changes.

The dataclasses hold every key with its default, the values it takes, and its meaning. Imports no torch.
"""

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tropd.config import ConfigError
from nemo_tropd.fields import (
    FLAG_OR_TEXT,
    FREE_FORM,
    NAMES,
    TOKENS,
    choice,
    day,
    flag,
    integer,
    number,
    refused,
    text,
)


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's file says, or ``NAME.key=value`` for one of several."""

    path: str | None = text(None)
    """Its problems: a file, folder, pattern or hub data set, as model.data.path of a run; a pattern may also match
    folders, each a data set."""
    package: str | None = text(None)
    """Instead of path, the pip name of an installed package that has them ..."""
    file: str | None = text(None)
    """... and which of its files, relative to the folder it is installed in."""
    split: str = text("test")
    """Of a data set that has splits."""
    where: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    """Only rows with these values in these columns; ``where={}`` on the command line: all."""
    limit: int | None = integer(None, at_least=1)
    """Only the first so many problems; null: all."""
    grader: str | None = text(None)
    """Of nemo_tropd/evaluation/graders/: each file says which columns and options it knows."""
    columns: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    """The column for each place of the prompt, and for what else the grader needs."""
    prompt: str = text("{problem}")
    """The user's turn, with places in braces."""
    options: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    """The grader's."""
    samples: int = integer(1, at_least=1)
    """Answers to each problem."""
    temperature: float = number(0.6, at_least=0, at_most=2)
    """0: the most probable token."""
    top_p: float = number(0.95, above=0, at_most=1)
    top_k: int = integer(0, at_least=0)
    """0: the entire vocabulary."""
    max_new_tokens: int = integer(32768, at_least=1)
    """Where an answer is cut off."""


@dataclass(frozen=True)
class Evaluation:
    """What holds for all benchmarks of a command."""

    model: str | None = text(None)
    """A Hugging Face folder, a run's directory (its hf/, else its last checkpoint) or a Megatron checkpoint."""
    compare: list[Any] = field(default_factory=list, metadata=NAMES)
    """Further ones; each is compared with model."""
    benchmarks: list[Any] = field(default_factory=list, metadata=NAMES)
    """Names of benchmarks' files; empty: this file is one."""
    out: str = text("evaluations")
    """Folder: answers are kept in answers/, for every later evaluation; results are in a folder named like the file."""
    seed: int = integer(1234, at_least=0, at_most=2**32 - 1)
    """With benchmark, problem and sample it determines each answer's own seed."""
    chat_template: Any = field(default=True, metadata=FLAG_OR_TEXT)
    """true: the model's own; false: none, for base models; or a file with a Jinja template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict, metadata=FREE_FORM)
    """Handed to the template, e.g. {enable_thinking: true} for Qwen3."""
    system_prompt: str | None = text(None)
    template_date: str = day("2024-07-26")
    """What templates that write the date of the day take for it."""
    end_tokens: list[Any] = field(default_factory=list, metadata=TOKENS)
    """Tokens that end an answer, as texts or ids; empty: those that the model's files name."""
    devices: int | None = integer(None, at_least=1)
    """GPUs of this node in use; null: all."""
    tensor_model_parallel_size: int = integer(1, at_least=1)
    """GPUs of one engine; devices over this many engines share the problems."""
    batch: int | None = integer(None, at_least=1)
    """Answers that are generated before they are saved; null: 64 on a CPU, 512 an engine on GPUs."""
    dtype: str = choice("bfloat16", "float32")
    max_num_seqs: int = integer(256, at_least=1)
    gpu_memory_utilization: float = number(0.9, above=0, at_most=1)
    kv_cache_gib: float = number(1.0, above=0)
    """Memory of the engine's key-value cache (CPU build)."""
    torch_compile: bool = flag(True)
    omp_threads: int = integer(1, at_least=1, at_most=1024)
    """Threads of the CPU engine; with 1 the same requests give the same bits in every evaluation."""
    request_timeout_s: float = number(86400.0, above=0)
    """Seconds a batch may take before the engine counts as dead."""


@dataclass(frozen=True)
class Plan:
    """A command line, read: ``name`` is its file's, and names the folder of the results."""

    name: str
    evaluation: Evaluation
    benchmarks: dict[str, Benchmark]


CONF = Path(__file__).resolve().parents[2] / "conf" / "benchmarks"
_SHARED, _OWN = [f.name for f in fields(Evaluation)], [f.name for f in fields(Benchmark)]
_SAMPLING = ("limit", "samples", "temperature", "top_p", "top_k", "max_new_tokens")  # of all benchmarks at once, too


def read_command_line(argv: Sequence[str], conf_dir: Path, usage: str = "") -> Plan:
    """``--config-name NAME [--config-dir DIR] key=value ...`` as a plan; ``--help`` prints ``usage`` and exits. Raises
    ConfigError for a file, key or value that there is not."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawTextHelpFormatter)

    def refuse(message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(argv), f"{message}; see --help")

    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("--config-name", required=True, help="a file of conf/benchmarks, without .yaml")
    parser.add_argument("--config-dir", help="a folder whose files are read, too, and first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of nemo_tropd/evaluation/settings.py")
    flags = parser.parse_intermixed_args(list(argv))
    folders = [Path(flags.config_dir), conf_dir] if flags.config_dir else [conf_dir]
    if not os.path.isdir(folders[0]):
        raise ConfigError("--config-dir", flags.config_dir, "there is no such directory")
    for part in flags.overrides:
        if "=" not in part:
            raise ConfigError("command line", part, "it takes key=value")
    try:
        given = _plain(OmegaConf.from_dotlist([p.lstrip("+") for p in flags.overrides]))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError("command line", " ".join(flags.overrides), f"cannot be read: {_line(error)}") from error
    name = flags.config_name.removesuffix(".yaml")
    return _plan(name, _file(name, folders), given, folders)


def _plan(name: str, tree: Mapping[str, Any], given: Mapping[str, Any], folders: Sequence[Path]) -> Plan:
    both = _merged(tree, given)
    names = both.get("benchmarks") or [name]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise ConfigError("benchmarks", names, "give a list of different names, such as [aime24,aime25]")
    _check_keys(both, (*_SHARED, *_OWN, *names))
    evaluation = Evaluation(**{k: both[k] for k in _SHARED if k in both})
    _check(evaluation, "")
    if evaluation.model is None:
        raise ConfigError("model", None, "give a Hugging Face folder, a run's directory or a Megatron checkpoint")
    common = {} if name in names else tree
    for key, value in (*common.items(), *(given.items() if len(names) > 1 else ())):
        if key in _OWN and key not in _SAMPLING:
            raise ConfigError(key, value, f"would hold for all benchmarks: set it for each, as {names[0]}.{key}")
    benchmarks = {}
    for one in names:
        own, prefix = tree if one == name else _file(one, folders), "" if names == [name] else f"{one}."
        _check_keys(own, (*_SHARED, *_OWN, *names) if one == name else _OWN, f"{one}.")
        parts = [own, common, common.get(one) or {}, given, given.get(one) or {}]
        for part in (parts[2], parts[4]):
            _check_keys(part, _OWN, f"{one}.")
        benchmarks[one] = Benchmark(**_merged(*({k: v for k, v in part.items() if k in _OWN} for part in parts)))
        _check(benchmarks[one], prefix)
        _check_benchmark(benchmarks[one], prefix)
    return Plan(name, evaluation, benchmarks)


def benchmarks_of(entries: Sequence[Any], key: str) -> dict[str, tuple[str, Benchmark]]:
    """Benchmarks of a run, and what their keys begin with in messages, by name. An entry names a file of
    conf/benchmarks, or another with its path, or is a dictionary of such a ``name`` and the keys that differ. Raises
    ConfigError."""
    found: dict[str, tuple[str, Benchmark]] = {}
    for i, entry in enumerate(entries):
        prefix, own = f"{key}[{i}].", dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        path = Path(str(own.pop("name", None)))
        name = path.name.removesuffix(".yaml")
        if name in found:
            raise ConfigError(f"{prefix}name", name, "is there twice: name each benchmark once")
        tree = _file(name, [CONF if path.parent == Path() else path.parent], f"{prefix}name")
        for part in (tree, own):
            _check_keys(part, _OWN, prefix)
        found[name] = prefix, Benchmark(**_merged(tree, own))
        _check(found[name][1], prefix)
        _check_benchmark(found[name][1], prefix)
    return found


def _merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones win; dictionaries are merged, except that an empty one clears the old, and that a new source takes
    the place of the old."""
    found: dict[str, Any] = {}
    for tree in trees:
        if tree.get("path") is not None:
            found = {k: v for k, v in found.items() if k not in ("package", "file")}
        for key, value in tree.items():
            old = found.get(key)
            if isinstance(old, dict) and isinstance(value, dict) and value:
                value = {**old, **value}
            found[key] = value
    return found


def _check_keys(tree: object, known: Sequence[str], prefix: str = "") -> None:
    if not isinstance(tree, Mapping):
        raise ConfigError(prefix.rstrip("."), tree, f"give its keys, such as {prefix}samples=4")
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else "see nemo_tropd/evaluation/settings.py for the keys"
            raise ConfigError(f"{prefix}{key}", value, f"there is no such key; {hint}")


def _check(settings: Evaluation | Benchmark, prefix: str) -> None:
    for key, value, wanted in refused(settings):
        raise ConfigError(prefix + key, value, wanted)


def _check_benchmark(b: Benchmark, prefix: str) -> None:
    if tuple(v is not None for v in (b.path, b.package, b.file)) not in ((True, False, False), (False, True, True)):
        raise ConfigError(f"{prefix}path", b.path, "name the path of the problems, or else their package and file")
    if b.grader is None:
        raise ConfigError(f"{prefix}grader", None, "name one of nemo_tropd/evaluation/graders/")
    if 0 < b.temperature < 0.01:
        raise ConfigError(f"{prefix}temperature", b.temperature, "vLLM would take 0.01: give that, or 0 for greedy")
    if b.temperature == 0 and b.samples > 1:
        raise ConfigError(f"{prefix}samples", b.samples, "at temperature 0 all answers are the same: set it to 1")


def _file(name: str, folders: Sequence[Path], key: str = "--config-name") -> dict[str, Any]:
    """The content of a benchmark's file. Raises ConfigError."""
    files = [folder / f"{name}.yaml" for folder in folders]
    path = next((file for file in files if os.path.isfile(file)), None)  # False, too, of a name that is too long
    if path is None:
        there = ", ".join(sorted({p.stem for folder in folders for p in folder.glob("*.yaml")}))
        raise ConfigError(key, name, f"there is no such benchmark; there are {there}")
    try:
        return _plain(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(key, name, f"{path} cannot be read: {_line(error)}") from error


def _plain(config: Any) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=True)
    if not isinstance(content, dict):
        raise ValueError("it must have keys with values")
    return {str(key): value for key, value in content.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
