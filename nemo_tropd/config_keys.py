"""Keys and types of a configuration against the schema, and the errors for what does not fit."""

from __future__ import annotations

import difflib
from dataclasses import is_dataclass

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nemo_tropd.config import ConfigError, TropdConfig, schema_fields, schema_keys
from nemo_tropd.fields import complaint


def unknown_key(key: str, value: object, where: str = "") -> ConfigError:
    """The error for a key that the schema does not have, with the nearest ones that it has."""
    known = [k for k, field in schema_fields() if "check" in field.metadata]
    leaf = key.rsplit(".", 1)[-1]
    near = [k for k in known if k.rsplit(".", 1)[-1] == leaf] or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}?" if near else "see nemo_tropd/config.py for the keys there are"
    return ConfigError(key, value, f"{where}there is no such key; {hint}")


def bad_value(key: str, value: object, reason: str, where: str = "") -> ConfigError:
    """The error for a value whose type does not fit its key, with what the key takes; ``reason`` for other faults."""
    found = dict(schema_fields()).get(key)
    if found is not None and "check" not in found.metadata:
        reason = f"is a section: set its keys, such as {next(k for k in schema_keys() if k.startswith(key + '.'))}"
    elif found is not None:
        reason = complaint(found, value) or complaint(found, []) or reason
    return ConfigError(key, value, where + reason)


def typed(cfg: DictConfig, where: str = "") -> DictConfig:
    """A configuration with the schema's keys, types and defaults; ``where`` it comes from, for the message.
    Raises ConfigError for a key that the schema does not have, and a value of the wrong type."""
    plain = OmegaConf.to_container(cfg)  # a section with a type would bring along keys that were added to it
    try:
        return DictConfig(OmegaConf.merge(OmegaConf.structured(TropdConfig), plain))
    except OmegaConfBaseException as error:
        key = str(error.full_key or scalar_section(plain))
        if isinstance(error, ConfigKeyError | ConfigAttributeError):
            raise unknown_key(key, value_at(plain, key), where and f"{where} sets it, but ") from error
        raise bad_value(key, value_at(plain, key), str(error.msg), where and f"{where}: ") from error


def scalar_section(tree: object) -> str:
    """The first section of the schema that has a value of its own in ``tree``; OmegaConf does not name it."""
    values = ((key, value_at(tree, key)) for key, field in schema_fields() if "check" not in field.metadata)
    return next((key for key, value in values if value is not None and not isinstance(value, dict)), "")


def value_at(tree: object, key: str) -> object:
    """The value of a dotted key in nested dictionaries or dataclasses; None if it is not there."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else getattr(tree, name) if is_dataclass(tree) else None
    return tree
