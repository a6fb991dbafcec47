"""What several tests of the command line read."""

import pytest

from ssmc.runtime.models.generation import open_session


@pytest.fixture(scope="session")
def loaded():
    return open_session("tiny", device="cpu")
