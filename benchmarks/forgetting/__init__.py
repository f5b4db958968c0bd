"""What is forgotten while environments are learnt one after the other."""
