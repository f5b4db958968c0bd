"""Adapters: sets of tasks that others made, as environments. Each needs a package of its own."""
