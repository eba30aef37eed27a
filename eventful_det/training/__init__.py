"""Training: optimiser groups, schedules, a trainer that resumes exactly."""
