"""How a detector behaves live: streams, budgets, refreshes."""
