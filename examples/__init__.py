"""Examples: users of the public interfaces only; not installed, run from the repository root."""
