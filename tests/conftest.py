"""Set-up shared by all tests: Triton's interpreter, NaN in fresh memory, hypothesis profiles, the pool of ranks."""

from __future__ import annotations

import environment  # isort: skip  (first: it sets TRITON_INTERPRET before anything imports triton)

import os
from collections.abc import Iterator

import hypothesis
import pytest
from pool import Pool

_slow_is_fine = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile(
    "default", max_examples=10, deadline=None, derandomize=True, suppress_health_check=_slow_is_fine
)
hypothesis.settings.register_profile("many", max_examples=300, deadline=None, suppress_health_check=_slow_is_fine)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Memory from `torch.empty` is NaN in every test, also after one that switched it off."""
    environment.poison_memory()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight ranks that live as long as the session; they start at the first `pool.run`."""
    with Pool() as ranks:
        yield ranks
