"""What it was worth: average precision, what it cost, and sweeps over budgets and baselines."""
