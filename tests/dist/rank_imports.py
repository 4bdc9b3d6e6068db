"""What the ranks of ``run_distributed`` need: the server from which they are forked imports it once."""

import gc

import pytest  # noqa: F401

import nemo_tropd.training.run  # noqa: F401
from tests.empty_charts import empty_charts

empty_charts()

gc.collect()
gc.freeze()  # a collection in a rank would copy every page that it looks at
