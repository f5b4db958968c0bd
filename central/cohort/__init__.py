"""The life of one cohort, through Flower: updates enter; candidates and verdicts leave.

Importing this room imports Flower; `central --help` must not.
"""

import os

# Flower reports its use to its makers unless told otherwise, and reads this when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from central.cohort.loop import run_cohort
from central.cohort.strategies.flower import check_strategy

__all__ = ["check_strategy", "run_cohort"]
