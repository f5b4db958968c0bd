"""The quickstart's own world: a seed enters, a tiny base model, customer tool APIs with verifiers, and traffic leave."""
