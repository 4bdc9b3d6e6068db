"""Silences libraries' notices, so that a run's own output stays readable; errors are still shown."""

import logging
import os
import warnings

VERBOSE = "NEMO_TROPD_VERBOSE"


def quiet_libraries() -> None:
    """Call before importing NeMo, Lightning and Megatron. NEMO_TROPD_VERBOSE=1 leaves all logging as it is."""
    if os.environ.get(VERBOSE) == "1":
        return
    os.environ.setdefault("NEMO_TESTING", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    # After importing NeMo, since Lightning sets its level on import.
    for name in ("lightning.pytorch", "lightning.fabric", "megatron", "nv_one_logger", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
