"""A central in this process, with five nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.cohort_loop import Central, opened
from tests.contract.lost_blobs.damage import NODES


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central
