"""How long a step takes: which of its phases follow one another, and which run side by side."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_tropd.config import TropdConfig
from nemo_tropd.convert.families import ModelShape
from nemo_tropd.planner import rates
from nemo_tropd.planner.degrees import scores_early
from nemo_tropd.planner.engine import engine_load
from nemo_tropd.planner.machine import Machine
from nemo_tropd.planner.memory import placement
from nemo_tropd.planner.seconds import checkpoint_seconds, spoken, step_seconds

ENGINES = ("rollouts", "weights to the engine")  # the phases of engines; all others are the trainer's


@dataclass(frozen=True)
class Pace:
    """A step's phases in seconds, and what of them passes while others do."""

    phases: Mapping[str, float]
    hidden: float = 0.0  # seconds that a step is shorter than the sum of its phases
    how: str = ""  # what runs beside what, human-readable; "": every phase waits for the one before

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.phases.values()) - self.hidden

    @property
    def engines(self) -> float:
        """Seconds of a step in which engines generate or take weights."""
        return sum(self.phases.get(phase, 0.0) for phase in ENGINES)

    @property
    def trainer(self) -> float:
        """Seconds of a step in which the trainer works."""
        return sum(self.phases.values()) - self.engines


def step_pace(
    cfg: TropdConfig,
    student: ModelShape,
    teacher: ModelShape,
    machine: Machine,
    wire: Mapping[str, float],
    *,
    exact: bool = False,
    in_turns: bool = False,
    length: float = rates.LENGTH,
) -> Pace:
    """The pace of a checked configuration, without phases on a CPU. Keywords as in ``scores_early`` and
    ``step_seconds``.

    With ``model.rollout.steps_ahead`` engines of their own are at a later step while the trainer is at this one: a step
    takes as long as the longer of both. A child process shares rank 0's GPU, and nothing is counted as gained. Without,
    a teacher that scores early is at work while other rollouts are generated, so that the last wave's come too late.
    """
    phases = step_seconds(cfg, student, teacher, machine, wire, length=length)
    where = placement(cfg, machine)
    if not phases:
        return Pace(phases)
    in_order = Pace(phases)
    if cfg.model.rollout.steps_ahead:
        if where != "dedicated":
            return Pace(phases, how="the engine shares rank 0's GPU with the trainer: nothing is counted as gained")
        shorter = min(in_order.engines, in_order.trainer)
        return Pace(phases, shorter, "rollouts and weights to the engine beside the rest")
    if where == "dedicated" and scores_early(cfg, where, exact=exact, in_turns=in_turns):
        before_the_last = 1 - length / engine_load(cfg, student, machine).waves
        hidden = before_the_last * min(phases["rollouts"], phases["teacher"])
        return Pace(phases, hidden, "the teacher beside all but the last rollouts" if hidden else "")
    return in_order


def time_lines(cfg: TropdConfig, student: ModelShape, pace: Pace) -> list[tuple[str, str]]:
    """Where the time of a step and of the run goes."""
    if not pace.phases:
        return []
    step, t = pace.seconds, cfg.trainer.tropd
    parts = ", ".join(f"{phase} {spoken(value)}" for phase, value in pace.phases.items())
    parts += f" ({pace.how})" if pace.how else ""
    saves = -(-t.max_steps // t.save_interval) if t.save_interval else 1  # the last step is always saved
    save = checkpoint_seconds(cfg, student)
    text = f"at most {spoken(t.max_steps * step + saves * save)}: {t.max_steps} steps, {saves} checkpoint(s) of "
    return [
        ("time of a step", f"at most {spoken(step)} (estimated, every response of the greatest length): {parts}"),
        ("time of a run", f"{text}{spoken(save)}; what comes before the first step and validations apart"),
    ]
