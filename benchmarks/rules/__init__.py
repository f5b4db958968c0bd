"""Which merge rule needs the fewest rounds: nodes train for real, central's rules merge."""
