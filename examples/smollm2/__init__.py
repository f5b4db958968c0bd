"""A real instruct model for the demo: SmolLM2-135M-Instruct, and work that it does not know yet."""
