import pytest

from tests.training import tiny


@pytest.fixture(scope="session")
def world(config, params):
    return tiny.World(config, params)
