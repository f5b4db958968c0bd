"""Which merge rule needs the fewest rounds: the quickstart's nodes train for real, central's rules merge (__main__.py)."""
