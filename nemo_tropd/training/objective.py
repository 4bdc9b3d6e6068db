"""The objective of a run, as its configuration names it."""

from dataclasses import replace

from nemo_tropd.config import ConfigError, TropdConfig, anneal_steps, guided, teacher_named
from nemo_tropd.config_teacher import DEFAULT_TEACHER
from nemo_tropd.objectives import Objective, ParameterError, build, parameters

IMPORTANCE_CAP = 2.0  # with steps_ahead, unless it is set
OWN_KEYS = ("gate", "outlier", "tail", "guidance_weight")  # parameters of the objective with keys beside params


def build_objective(cfg: TropdConfig) -> Objective:
    """The objective that ``model.tropd`` names; ConfigError for a name, a parameter or a value that there is not."""
    t = cfg.model.tropd
    given = {**t.params, **{name: value for name in OWN_KEYS if (value := getattr(t, name)) is not None}}
    try:
        objective = build(t.objective, **given)
        corrected = "importance_cap" in given or given.get("old_policy") == "behavior"
        if cfg.model.rollout.steps_ahead and not objective.needs_distributions and not corrected:
            objective = replace(objective, importance_cap=IMPORTANCE_CAP)  # rollouts are older weights'
    except ParameterError as error:
        key = "model.tropd" if getattr(t, error.parameter, None) is not None else "model.tropd.params"
        raise ConfigError(f"{key}.{error.parameter}", error.value, f"{t.objective}: {error.wanted}") from error
    except (ValueError, TypeError) as error:
        known = ""
        if "unknown objective" not in str(error):
            known = f"; parameters of {t.objective}: {', '.join(parameters(t.objective))}"
        raise ConfigError("model.tropd.objective", t.objective, f"{error}{known}") from error
    if objective.needs_distributions and cfg.model.rollout.top_k:
        cut = (
            f"{t.objective} compares the complete distributions of student and teacher, and top-k cuts what is sampled"
        )
        remedy = f"{cut}: set it to 0 (and model.rollout.top_p to 1), or choose a sampled objective"
        raise ConfigError("model.rollout.top_k", cfg.model.rollout.top_k, remedy)
    if guided(cfg) and objective.guidance_weight is None:
        key = "model.tropd.guidance.enabled"
        why = f"{t.objective} has no loss on teacher prefixes, and its own is for tokens that the student sampled: "
        remedy = f"{why}leave it out, or set model.tropd.guidance_weight (0.001 of tropd)"
        raise ConfigError(key, t.guidance.enabled, remedy)
    served = any(teacher_named(cfg.model, name).url for name in (DEFAULT_TEACHER, *cfg.model.teachers))
    if served and (objective.needs_distributions or objective.needs_teacher_entropy):
        needs = "the teacher's complete distributions" if objective.needs_distributions else "the teacher's entropy"
        why = f"it needs {needs}, and servers give candidates alone: choose a sampled objective such as tropd"
        raise ConfigError("model.tropd.objective", t.objective, f"{why}, or set url of all teachers to null")
    return objective


def prefix_line(cfg: TropdConfig) -> str:
    """How many teacher-generated tokens the student continues, human-readable."""
    t = cfg.model.tropd
    if guided(cfg):
        return f"at most {t.guidance.max_prefix_tokens} tokens at step 1, none after step {anneal_steps(cfg)}"
    own = t.guidance.enabled is None and t.guidance.max_prefix_tokens
    return f"none: {t.objective} has no loss on them (model.tropd.guidance_weight)" if own else "none"
