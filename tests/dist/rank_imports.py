"""What the ranks of ``run_distributed`` need: the server from which they are forked imports it once."""

import pytest  # noqa: F401

from nemo_tropd.imports import without_collections

with without_collections(freeze=True):  # a collection in a rank would copy every page that it looks at
    import nemo_tropd.training.run  # noqa: F401
    from tests.empty_charts import empty_charts

empty_charts()
