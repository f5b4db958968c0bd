"""The operator's line: questions and orders enter; listings, tokens and journal events leave."""
