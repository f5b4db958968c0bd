"""What every test starts from."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def logs_are_as_in_a_process_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages change logging when they are imported, which any earlier test may have done.

    model_hosting_container_standards, which vLLM imports, sets the root logger to ERROR. TRL sets
    VLLM_LOGGING_LEVEL to ERROR, and a vLLM that a test starts would inherit it.
    """
    logging.root.setLevel(logging.WARNING)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
