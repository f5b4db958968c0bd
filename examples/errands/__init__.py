"""A tiny world of two tool calls, look up and then act: its environment, and a base for it."""
