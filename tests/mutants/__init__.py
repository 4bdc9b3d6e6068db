"""Single-line faults that the tests must notice: the list, and what plants them (``make mutants``)."""
