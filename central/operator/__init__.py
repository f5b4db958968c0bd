"""The operator's line: questions and orders of operators enter; listings, tokens and journal events leave."""
