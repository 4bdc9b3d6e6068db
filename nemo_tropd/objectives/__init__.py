"""Every objective by name: ``build("tropd", gate="soft")``.

To add one: a file with a frozen dataclass that derives from ``Objective`` and whose ``token_loss`` reads like its
equation (or from ``ExactObjective``, if it sees both distributions in full), an entry below, and an oracle in
tests/oracles.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from .aopd import AOPD
from .clip_outlier import ClipOutlier
from .entropy_opd import EntropyOPD
from .eopd import EOPD
from .fkl import ForwardKL
from .fkl_exact import ExactForwardKL
from .fkl_outlier import FKLOutlier
from .gopd import GOPD
from .jsd import JSD
from .jsd_exact import ExactJSD
from .mask_outlier import MaskOutlier
from .objective import Metrics, Objective, ParameterError
from .opd import OPD
from .opd_exact import ExactOPD
from .reopold import REOPOLD
from .reopold_2stage import REOPOLDTwoStage
from .topd import TOPD
from .topd_exact import ExactTOPD
from .tropd import TrOPD
from .tropd_aopd import TrOPDWithAOPD
from .tropd_exact import ExactTrOPD

__all__ = ["OBJECTIVES", "Metrics", "Objective", "ParameterError", "build", "parameters"]

OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (
        OPD, ForwardKL, JSD, EntropyOPD, ClipOutlier, MaskOutlier, FKLOutlier, TrOPD, EOPD, REOPOLD, REOPOLDTwoStage,
        AOPD, TOPD, GOPD, TrOPDWithAOPD, ExactTrOPD, ExactOPD, ExactForwardKL, ExactJSD, ExactTOPD,
    )
}  # fmt: skip

# Set by at_step and bind, never by a user.
_BOUND = frozenset({"step", "threshold", "factor", "baseline_value"})


def build(name: str, **params: Any) -> Objective:
    """The objective of that name. Parameters left out take the defaults of its class; ``lambda`` is accepted as such.
    Raises ValueError for an unknown name or parameter, listing the known ones, and for a value outside its range."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    given = {("lambda_" if key == "lambda" else key): value for key, value in params.items()}
    known = parameters(name)
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"objective {name!r} has no parameter {_list(unknown)}; it knows {_list(known)}")
    return OBJECTIVES[name](**given)


def parameters(name: str) -> tuple[str, ...]:
    """The names of an objective's parameters."""
    return tuple(f.name for f in fields(OBJECTIVES[name]) if f.name not in _BOUND)


def _list(names: Iterable[str]) -> str:
    return ", ".join(n.rstrip("_") for n in names)
