"""Faults planted in a run of this process: in a named phase, on one rank, at one occurrence, something happens."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Where each phase of a run can be interfered with: module, owner ("" for the module itself), function.
PHASES = {
    "plan": ("nemo_tropd.training.run", "", "make_plan"),
    "responses": ("nemo_tropd.training.run", "", "generate_teacher_responses"),
    "load": ("nemo_tropd.model.tropd_model", "", "load_hf"),
    "engine start": ("tests.doubles", "ReplayEngine", "start"),
    "rollout": ("tests.doubles", "ReplayEngine", "generate"),
    "pack": ("nemo_tropd.training.packing", "Packer", "pack"),
    "teacher": ("nemo_tropd.model.tropd_model", "MegatronTrOPDModel", "score"),
    "student": ("nemo_tropd.model.tropd_model", "MegatronTrOPDModel", "get_loss_and_metrics"),
    "optimizer": ("nemo_tropd.training.optimizer", "StudentOptimizer", "step"),
    "refresh": ("tests.doubles", "ReplayEngine", "update_weights"),
    "vllm rollout": ("nemo_tropd.rollout.vllm.remote", "RemoteEngine", "generate"),
    "vllm refresh": ("nemo_tropd.rollout.vllm.remote", "RemoteEngine", "update_weights"),
    "log": ("nemo_tropd.training.metrics", "MetricsLog", "write"),
    "validation": ("nemo_tropd.training.validation", "Validator", "_divergences"),
    "save": ("megatron.core.dist_checkpointing", "", "save"),
    "export": ("nemo_tropd.training.run", "", "save_hf"),
    "report": ("nemo_tropd.report", "", "write_report"),
}


def plant(phase: str, happens: Callable[[], object], *, rank: int, occurrence: int = 1) -> Callable[[], None]:
    """``happens`` before the ``occurrence``-th call of ``phase`` on ``rank``; returns what takes it back."""
    module_name, owner_name, function = PHASES[phase]
    module = importlib.import_module(module_name)
    owner = getattr(module, owner_name) if owner_name else module
    original, calls = getattr(owner, function), [0]

    def call(*args: Any, **kw: Any) -> Any:
        calls[0] += 1
        if calls[0] == occurrence and int(os.environ.get("RANK", "0")) == rank:
            happens()
        return original(*args, **kw)

    setattr(owner, function, call)
    return lambda: setattr(owner, function, original)


@contextmanager
def planted(phase: str, happens: Callable[[], object], *, rank: int, occurrence: int = 1) -> Iterator[None]:
    """``plant`` for the time of the context."""
    take_back = plant(phase, happens, rank=rank, occurrence=occurrence)
    try:
        yield
    finally:
        take_back()
