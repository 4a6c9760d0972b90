"""What all tests share: they test the tree that they stand in, and each gets its own seed."""

from pathlib import Path

import pytest
import torch

import lockstep

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    tested = Path(lockstep.__file__).resolve().parent
    if tested != ROOT:
        raise pytest.UsageError(
            f"lockstep is imported from {tested}: pip install -e {ROOT} to test this tree"
        )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
