"""`central`: the operator's command line.

In: arguments and CENTRAL_* variables. Out: text for people, or JSON. Guarantees: every error is one
clear line with an exit code; `--help` loads neither gRPC nor Flower nor a database.
"""

from central.cli.program import app, main

__all__ = ["app", "main"]
