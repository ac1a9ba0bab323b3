"""The two papers at a glance: token order, noise level, tasks, conditions, solvers."""
