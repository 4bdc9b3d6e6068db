"""Small experiments that run in minutes on two cores: objectives side by side, and what the head costs."""
