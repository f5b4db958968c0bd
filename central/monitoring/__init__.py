"""What central tells monitoring systems: figures when they ask, events when they happen."""
