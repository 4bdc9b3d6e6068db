"""A configuration as the command line would compose it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from nemo_tropd.config import TropdConfig
from nemo_tropd.config_checks import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"


def compose_config(overrides: Sequence[str], name: str = "base") -> TropdConfig:
    """conf/NAME.yaml with ``overrides``, checked."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        return resolve(compose(name, overrides=list(overrides)))
