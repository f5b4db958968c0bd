"""One BLAS thread inside, whoever else is inside; as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from central.cohort.payload import Standing, build_payload
from central.cohort.strategies.product_mean import ProductMean, Start
from central.merging import one_thread
from tests.unit.central import builders as make


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As an environment may want it. Fails where numpy brings another BLAS than the one that is
    steered.
    """
    before = one_thread.threads
    one_thread._set(2)
    assert one_thread.threads == 2
    yield
    one_thread._set(before)


def test_one_until_the_last_has_left() -> None:
    with one_thread:
        with one_thread:
            assert one_thread.threads == 1
        assert one_thread.threads == 1, "the first is still inside"
    assert one_thread.threads == 2
    with pytest.raises(ValueError, match="inside"), one_thread:
        raise ValueError("inside")
    assert one_thread.threads == 2


class Asked:
    """Blobs that note how many threads there are when they are read."""

    def __init__(self) -> None:
        self.threads = 0

    def read(self, digest: str) -> bytes:
        self.threads = one_thread.threads
        return b"payload"


def test_a_plan_is_merged_with_one_thread() -> None:
    plan = make.make_plan(make.make_release())
    blobs = Asked()
    start = Start("own")
    strategy = ProductMean(plan, start, blobs)
    assert build_payload(plan, Standing(start), strategy, blobs, ()) is not None
    assert (plan.blas_threads, blobs.threads, one_thread.threads) == (1, 1, 2)
