"""Default hyperparameters for a text, a machine and a time limit."""
