"""`python -m central.cli`."""

from central.cli.program import main

main()
