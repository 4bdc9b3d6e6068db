"""The model class of a run: student, teacher, objective and rollout engine over one topology."""
