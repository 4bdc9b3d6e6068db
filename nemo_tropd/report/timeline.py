"""A typical step of a run, lane by lane, and what to turn if one of them waits."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemo_tropd.report.text import number
from nemo_tropd.timeline import EARLY, LANES, SEND, Lane, StepTimes, length

_MEMBERS_SHOWN = 16  # of more engines every n-th
_PAUSES = 0.05  # between steps, for validations and checkpoints: rows of steps with less, as a share, are preferred
_WAITS, _MORE = 0.2, 0.1  # the idle share from which on a side waits, and how much more than the other it must be
_GAIN = 0.1  # share of a step that steps ahead must save to be named
_UNEVEN = 0.3  # idle share of an engine, on average, while any generates
_BAR = 0.72  # of the height of a lane
_SAME = 1e-4  # seconds between two bars that are one, written in two steps


@dataclass(frozen=True)
class Kind:
    """How bars of one kind look: ``color`` is a name of COLORS, the one of the same phase in "Time of a step"."""

    label: str
    color: str
    opacity: float = 1.0


_KINDS = {  # by lane, then by what it does; "": whatever else it does
    "engines": {"": Kind("generating", "c0")},
    "teacher": {"": Kind("scoring", "c1"), EARLY: Kind("scoring while others are generated", "c1", 0.5)},
    "student": {"": Kind("forward and backward", "c2"), "optimizer": Kind("optimizer", "c3")},
    "weights": {"": Kind("copying", "c4"), SEND: Kind("sending to the engines", "c5")},
}


@dataclass(frozen=True)
class Bar:
    """Someone at work, from ``begin`` to ``end``, in seconds. ``number``: of a bar of the engines, whose weights."""

    begin: float
    end: float
    kind: Kind
    number: str = ""


@dataclass(frozen=True)
class Row:
    """Bars at one height: of a lane, or of one engine of several. Lane n is from n to n + 1, downwards."""

    top: float
    height: float
    bars: list[Bar]


@dataclass(frozen=True)
class Picture:
    """Steps one after another on one axis of seconds."""

    title: str
    note: str
    advice: str
    lanes: dict[str, float]  # their idle shares, from top to bottom
    rows: list[Row]
    steps: list[tuple[float, float, str]]  # begin, end and name of each; between two of them is a pause

    @property
    def end(self) -> float:
        """Seconds."""
        return self.steps[-1][1]

    @property
    def kinds(self) -> list[Kind]:
        """Those that there are, from top to bottom."""
        used = {bar.kind for row in self.rows for bar in row.bars}
        return [kind for kinds in _KINDS.values() for kind in kinds.values() if kind in used]

    @property
    def values_in_words(self) -> str:
        """For the text alternative."""
        idle = "; ".join(f"{name}: idle {share:.0%}" for name, share in self.lanes.items())
        return f"{number(self.end)} seconds. {idle}"


def picture_of(timeline: Sequence[StepTimes]) -> Picture | None:
    """A typical part of the run: the step of median duration; where engines work k steps ahead k + 2 of them, so that
    it is seen. None without any step."""
    if not timeline:
        return None
    steps = _typical(timeline)
    seconds = sum(one.seconds for one in steps)
    idle = {name: sum(one.idle[name] * one.seconds for one in steps) / seconds for name in LANES}
    placed = list(_placed(steps))
    title = f"Step {steps[0].step}" if len(steps) == 1 else f"Steps {steps[0].step} to {steps[-1].step}"
    note = f"{number(seconds)} s, the median of this run. Where a lane is empty, it is idle."
    if steps[-1].steps_ahead:
        note += " The number in a bar of the engines: after how many steps the student was the one that generates."
    return Picture(
        title,
        note,
        _advice(steps, idle),
        idle,
        [row for place, name in enumerate(LANES) for row in _rows(name, place, placed)],
        [(at, at + one.seconds, f"step {one.step}") for at, one in placed],
    )


def _typical(timeline: Sequence[StepTimes]) -> Sequence[StepTimes]:
    now, ahead = _how(timeline[-1]), timeline[-1].steps_ahead
    timeline = [one for one in timeline if _how(one) == now]
    for size in range(min(ahead + 2, len(timeline)) if ahead else 1, 0, -1):
        windows = [w for i in range(len(timeline) - size + 1) if _in_a_row(w := timeline[i : i + size])]
        close = [w for w in windows if sum(one.pause or 0.0 for one in w[1:]) <= _PAUSES * sum(p.seconds for p in w)]
        if windows := close or windows:
            by_duration = sorted(windows, key=lambda w: sum(one.seconds for one in w))
            return by_duration[(len(by_duration) - 1) // 2]
    raise AssertionError("a single step is in a row")


def _in_a_row(steps: Sequence[StepTimes]) -> bool:
    """Whether one process did these steps one after another."""
    return all(b.step == a.step + 1 and b.pause is not None for a, b in pairwise(steps))


def _how(one: StepTimes) -> tuple[int, str, tuple[str, ...]]:
    """What a resumed run may change."""
    return one.steps_ahead, one.placement, tuple(one.lanes)


def _placed(steps: Sequence[StepTimes]) -> Iterator[tuple[float, StepTimes]]:
    """Each step with the seconds at which it begins."""
    at = 0.0
    for i, one in enumerate(steps):
        at += (one.pause or 0.0) if i else 0.0
        yield at, one
        at += one.seconds


def _rows(lane: str, place: int, steps: Sequence[tuple[float, StepTimes]]) -> Iterator[Row]:
    count = len(steps[0][1].members(lane))
    shown = range(0, count, -(-count // _MEMBERS_SHOWN))
    height = _BAR / len(shown)
    for i, member in enumerate(shown):
        bars: list[Bar] = []
        for at, one in steps:
            for bar in _bars(lane, at, one.members(lane)[member], numbered=one.steps_ahead > 0):
                last = bars[-1] if bars else None
                if last and (last.kind, last.number) == (bar.kind, bar.number) and bar.begin <= last.end + _SAME:
                    bar = Bar(bars.pop().begin, bar.end, bar.kind, bar.number)
                bars.append(bar)
        yield Row(place + (1 - _BAR) / 2 + i * height, height, bars)


def _bars(lane: str, at: float, member: Lane, *, numbered: bool) -> Iterator[Bar]:
    for begin, end, what in member.bars:
        weights = re.fullmatch(r"weights (\d{1,9})", what) if lane == "engines" and numbered else None
        kind = _KINDS[lane].get(what, _KINDS[lane][""])
        yield Bar(at + begin, at + end, kind, weights[1] if weights else "")


def _advice(steps: Sequence[StepTimes], idle: Mapping[str, float]) -> str:
    """What shortens such steps, if the lanes show it; else nothing."""
    if steps[-1].placement == "colocated":
        return "The engines are on the trainer's devices and take turns with it: an empty lane here is another's turn."
    if steps[-1].placement != "dedicated":  # a child of rank 0: what one of them has, the other has not
        return ""
    seconds = sum(one.seconds for one in steps)
    generating = sum(length(_times(one, "engines")) for one in steps)
    trainer = sum(length(_times(one, "teacher", "student", "weights")) for one in steps)
    if not steps[-1].steps_ahead:
        sending = sum(length(_times(one, "weights", sent=True)) for one in steps)
        longer = max(generating + sending, trainer)
        if longer <= (1 - _GAIN) * seconds:
            return (
                "Engines and trainer wait for each other. With model.rollout.steps_ahead=1 they work at the same time: "
                f"a step takes about {number(longer)} s then, and learns from rollouts of the student one step before."
            )
    waits = 1 - trainer / seconds
    if idle["engines"] >= max(_WAITS, waits + _MORE):
        return "The engines wait for the trainer: a larger trainer.num_nodes or trainer.devices shortens a step."
    if waits < max(_WAITS, idle["engines"] + _MORE):
        return ""
    engines = [one.members("engines") for one in steps]
    each = sum(sum(m.busy for m in members) / len(members) for members in engines)
    if each < (1 - _UNEVEN) * generating:
        return (
            "The trainer waits for the longest responses while most engines have nothing left to do. More engines "
            "would wait as well; a smaller model.rollout.max_new_tokens shortens a step."
        )
    return "The trainer waits for rollouts: a larger model.rollout.dedicated.engines shortens a step."


def _times(one: StepTimes, *lanes: str, sent: bool = False) -> Iterator[tuple[float, float]]:
    """When any of these is at work; of the weights, the trainer's part or, if ``sent``, the engines'."""
    bars = (bar for lane in lanes for member in one.members(lane) for bar in member.bars)
    return ((begin, end) for begin, end, what in bars if (what == SEND) == sent)
