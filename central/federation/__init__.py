"""Federation: admitted updates of one cohort enter; candidates, verdicts and promotions leave, through Flower.

Importing this room imports Flower; `central --help` must not.
"""

import os

# Flower reports its use to its makers unless told otherwise, and reads this when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from central.federation.grid import JournalGrid
from central.federation.server_app import run_cohort
from central.federation.strategy import ProductMean
from central.federation.trial import check_strategy

__all__ = ["JournalGrid", "ProductMean", "check_strategy", "run_cohort"]
