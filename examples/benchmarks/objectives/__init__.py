"""Every objective on a small task: a table and a figure."""
