"""How the student's weights reach an engine."""
