"""From a command line to a configuration, and from an error to the end of the process.

The schema alone decides which keys there are, so ``key=value``, ``+key=value`` and ``++key=value`` are the same here.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nemo_tropd.config import ConfigError, schema_fields
from nemo_tropd.config_keys import bad_value, scalar_section, typed, unknown_key, value_at
from nemo_tropd.fields import complaint
from nemo_tropd.parallel.signals import STOP

_POLL_S, _RANK_0_POLLS = 0.1, 150  # rank 0 may need 15 s longer than another rank to find the same error


def fail(error: BaseException) -> NoReturn:
    """Print an error that a person can act on, without a traceback, and exit with code 2.

    torchrun ends all ranks as soon as one has exited, so the others wait for rank 0 to print its own first; one that
    waits in vain has an error of its own, and prints it.
    """
    rank, who = os.environ.get("RANK", "0"), ""
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for _ in range(_RANK_0_POLLS):
            if STOP:  # torchrun's SIGTERM came before the line above: rank 0 has spoken
                raise SystemExit(2)
            time.sleep(_POLL_S)
        who = f"rank {rank}: "
    print(f"\n{who}{type(error).__name__}: {printable(str(error))}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def printable(text: str) -> str:
    """``text`` from prompts, models or paths with control characters escaped: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def compose_command_line(argv: Sequence[str], conf_dir: Path, usage: str = "") -> DictConfig:
    """The configuration that a command line asks for, from the files in ``conf_dir``; see ``_HELP`` for the flags.

    ``--help`` (with ``usage``) and ``--cfg job`` print and exit with code 0. Raises ConfigError for a file, flag, key
    or value that there is not, and a value whose type does not fit its key.
    """
    flags = _parse(argv)
    folders = [Path(flags.config_path).absolute() if flags.config_path else conf_dir.absolute()]
    folders += [Path(flags.config_dir).absolute()] if flags.config_dir else []
    for key, folder in zip(("--config-path", "--config-dir"), folders, strict=False):
        if not os.path.isdir(folder):  # False, too, of a name that is too long
            raise ConfigError(key, str(folder), "there is no such directory")
    name = (flags.config_name or "base").removesuffix(".yaml")
    if flags.help:
        _show(f"{usage.strip()}\n\nConfigurations: {', '.join(_names(folders))}\n\n{_HELP}")
    overrides = [_read_override(override) for override in flags.overrides]
    cfg = _compose(name, folders, overrides)
    if flags.cfg:
        _show(OmegaConf.to_yaml(cfg, resolve=flags.resolve))
    return cfg


_HELP = """Flags:
  --config-name NAME   the file to start from (default: base)
  --config-path DIR    read files from DIR instead of conf/
  --config-dir DIR     read files from DIR, too
  --cfg job            print the composed configuration and exit
Every key with its default and meaning: nemo_tropd/config.py."""


def _show(text: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
    raise SystemExit(0)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(argv), f"{message}; see --help")

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(list(argv))
    one_run = "a command is one run: start one command for each set of values"
    for given, flag, remedy in (
        (flags.multirun, "--multirun", one_run),
        (flags.experimental_rerun, "--experimental-rerun", one_run),
        (flags.cfg not in (None, "job"), f"--cfg {flags.cfg}", "Hydra's own settings are not used; give --cfg job"),
        (flags.hydra_help, "--hydra-help", "Hydra's own settings are not used; give --help"),
        (flags.info, "--info", "give --cfg job"),
        (flags.package, "--package", "give --cfg job alone"),
        (flags.shell_completion, "--shell-completion", "there is none"),
    ):
        if given:
            raise ConfigError("command line", flag, remedy)
    return flags


def _read_override(text: str) -> Override:
    """One override, read by Hydra's own grammar."""
    key, equals, value = text.lstrip("+~").partition("=")
    if not key or not (equals or text.startswith("~")):
        raise ConfigError("command line", text, "it takes key=value")
    if re.split(r"[./@]", key)[0] == "hydra":
        raise ConfigError(key, value, "Hydra's own settings have no effect here; see --help for the flags")
    if text.startswith("~"):
        raise ConfigError(key, text, "a key cannot be deleted; set it to the value it should have")
    known = dict(schema_fields())
    if key not in known and not any(key.startswith(f"{k}.") and f.default_factory is dict for k, f in known.items()):
        raise unknown_key(key, value)
    field = known.get(key)
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:
        wanted = field and complaint(field, value)
        quotes = f"a string with special characters goes in quotes: '{key}=\"...\"'"
        raise ConfigError(key, value, wanted or f"Hydra cannot read this value; {quotes}") from error
    if override.is_sweep_override():
        raise ConfigError(key, value, "a list is written [a,b], a string with commas in quotes; there are no sweeps")
    if field is not None and isinstance(field.default, bool) and not isinstance(override.value(), bool | str):
        raise ConfigError(key, value, "give true or false")  # OmegaConf takes any number but 0 for true
    return override


def _compose(name: str, folders: list[Path], overrides: list[Override]) -> DictConfig:
    given = ["++" + str(o.input_line).lstrip("+") for o in overrides]
    # Hydra looks in its first folder alone for the file to start from.
    first = next((folder for folder in folders if os.path.isfile(folder / f"{name}.yaml")), folders[0])
    others = ["'file://" + str(f).replace("'", r"\'") + "'" for f in folders if f != first]
    try:
        with initialize_config_dir(str(first), version_base=None):
            cfg = compose(name, overrides=[*given, f"hydra.searchpath=[{','.join(others)}]"])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise _translated(error, name, folders, overrides) from error
    finally:
        GlobalHydra.instance().clear()
    return typed(cfg, f"{name}.yaml")


def _translated(error: Exception, name: str, folders: list[Path], overrides: list[Override]) -> ConfigError:
    """Our error for one of Hydra's: which key of which file or override, its value, and what it takes."""
    causes: list[BaseException] = [error]
    while (earlier := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(earlier)
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file)
        where = "" if missing == name else f"named in the defaults of {name}.yaml, but "
        there = f"there is no such file in {' or '.join(map(str, folders))}; there are {', '.join(_names(folders))}"
        return ConfigError("--config-name", missing, where + there)
    file = re.match(r"In '(.+?)'", str(error))
    tree = _read_file(file.group(1), folders) if file else {}
    cause = next((c for c in causes if isinstance(c, OmegaConfBaseException) and c.full_key), None)
    key = str(cause.full_key) if cause is not None else scalar_section(tree)
    if not key:
        return ConfigError("--config-name", name, f"cannot be composed: {' '.join(str(error).split())}")
    value = value_at(tree, key) if file else _value_given(overrides, key)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown_key(key, value, f"{file.group(1)}.yaml sets it, but " if file else "")
    return bad_value(key, value, str(cause.msg if cause else error), f"{file.group(1)}.yaml: " if file else "")


def _value_given(overrides: list[Override], key: str) -> object:
    """The value as it was typed, of the last override of ``key`` or of what is in it."""
    for override in reversed(overrides):
        name = f"{override.key_or_group}."
        if name.startswith(f"{key}.") or key.startswith(name):
            text = str(override.input_line).partition("=")[2]
            return None if text == "null" else text
    return None


def _read_file(name: str, folders: list[Path]) -> object:
    found = (folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file())
    return next((OmegaConf.to_container(OmegaConf.load(path)) for path in found), {})


def _names(folders: list[Path]) -> list[str]:
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
