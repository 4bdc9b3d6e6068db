"""Megatron's optimizer and schedule, with one decision on every rank: apply the step or skip it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_tropd.config import OptimConfig
from nemo_tropd.training.optimizer_shards import OptimizerShards


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    grad_norm: float  # global L2 norm before clipping; may be infinite or NaN
    applied: bool  # False: the gradient was not finite, and weights and optimizer states are as they were
    learning_rate: float


class StudentOptimizer:
    """Adam or SGD over the student's shards. Master weights and gradients are fp32 whatever the compute precision; the
    learning rate is a function of the step number alone."""

    def __init__(
        self, cfg: OptimConfig, model: DistributedDataParallel, *, dtype: torch.dtype, clip: float, max_steps: int
    ) -> None:
        self.model = model
        self.distributed = cfg.distributed
        bf16 = dtype == torch.bfloat16
        self.megatron = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=cfg.name,
                lr=cfg.lr,
                min_lr=cfg.sched.min_lr,
                weight_decay=cfg.weight_decay,
                adam_beta1=cfg.betas[0],
                adam_beta2=cfg.betas[1],
                adam_eps=cfg.eps,
                clip_grad=clip,
                bf16=bf16,
                params_dtype=dtype,
                use_distributed_optimizer=cfg.distributed,
            ),
            [model],
        )
        self.parts = getattr(self.megatron, "chained_optimizers", [self.megatron])
        for part in self.parts:
            if cfg.name == "sgd":
                part.init_state_fn = _momentum_of_zeros
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0 if cfg.sched.warmup_steps else cfg.lr,
            max_lr=cfg.lr,
            min_lr=cfg.sched.min_lr,
            lr_warmup_steps=cfg.sched.warmup_steps,
            # At min_lr 0 the schedule ends a step later: one at rate 0 would be lost.
            lr_decay_steps=max(cfg.sched.decay_steps or max_steps, cfg.sched.warmup_steps + 1)
            + (cfg.sched.min_lr == 0),
            lr_decay_style=cfg.sched.name,
            start_wd=cfg.weight_decay,
            end_wd=cfg.weight_decay,
            wd_incr_steps=max_steps,
            wd_incr_style="constant",
        )

    def zero_grad(self) -> None:
        """Clear the gradients, DDP's buffers among them: once, before the forward and backward passes of a step."""
        self.model.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, step: int) -> StepResult:
        """Clip and apply the accumulated gradient as step number ``step`` (from 0). One that is not finite leaves
        weights and optimizer states untouched; its norm is that of all ranks, so every rank takes the same decision."""
        self.schedule.num_steps = step
        self.schedule.step(1)
        learning_rate = float(self.megatron.param_groups[0]["lr"])
        self.megatron.prepare_grads()
        grad_norm = float(self.megatron.get_grad_norm())
        if not math.isfinite(grad_norm):
            return StepResult(grad_norm, False, learning_rate)
        self.megatron.step()
        return StepResult(grad_norm, True, learning_rate)

    def bad_gradient(self) -> str | None:
        """This rank's first parameter whose gradient is not finite."""
        named = ((name, p.main_grad) for name, p in self.model.module.named_parameters())
        return next((name for name, grad in named if not bool(grad.isfinite().all())), None)

    def make_states(self) -> None:
        """States as before a first step if there are none yet: Megatron saves and loads only what is there."""
        for part in self.parts:
            part.init_state_fn(part.optimizer, part.config)
            if isinstance(part.optimizer, torch.optim.Adam):  # AdamW among them; others count in the group
                for state in part.optimizer.state.values():
                    state.setdefault("step", torch.tensor(0.0))

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
        """The optimizer's part of a distributed checkpoint, sharded by parameter, so that any layout can load it."""
        self.make_states()
        if not self.distributed:
            return self.megatron.sharded_state_dict(model_state, is_loading=is_loading)
        (part,) = self.parts
        self.shards = OptimizerShards(part, model_state)
        # What Megatron calls a checkpoint whose states have their parameters' shapes.
        kind = {"param_state_sharding_type": "fully_reshardable"}
        return {**part.state_dict(), **kind, "param_state": self.shards.pieces()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore states loaded by Megatron's distributed checkpoint; rates, decay and betas stay those of this run."""
        groups = self.megatron.param_groups
        own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
        moments = state.get("optimizer", state).get("state")
        if moments is not None and isinstance(self.parts[0].optimizer, torch.optim.Adam):
            moments.setdefault("common_step", torch.tensor(0.0))  # Megatron does not save a count of 0
        for group in state.get("optimizer", state)["param_groups"]:
            # Since 0.19 Megatron finds a group's saved states by its rates, too, which a resumed run may change.
            group.update({k: groups[0][k] for k in ("max_lr", "min_lr") if k in groups[0]})
        pieces = state.pop("param_state", None)
        with torch.no_grad():
            self.megatron.load_state_dict(state)
            if pieces is not None:
                self.shards.load(pieces)
        for group, settings in zip(self.megatron.param_groups, own, strict=True):
            group.update(settings)
        for part in self.parts:
            for entry in part.optimizer.state.values():
                if torch.is_tensor(entry.get("step")):
                    entry["step"] = entry["step"].clone()  # Megatron gives all parameters one tensor to count in


def _momentum_of_zeros(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Megatron has no such function for SGD. With zeros the first step is the one without a buffer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
