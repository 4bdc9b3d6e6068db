"""What can only be proved on a GPU, a module a subject: ``check()`` yields a Row for every point."""
