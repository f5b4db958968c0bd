"""The quickstart's world: a tiny base model, customers' tool APIs with verifiers, traffic.

In: a seed.
"""
