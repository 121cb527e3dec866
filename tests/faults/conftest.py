import pytest

from tests.faults import flips


@pytest.fixture(scope="session")
def starts(tmp_path_factory):
    """A run's workdir after each stage; see `flips.snapshots`."""
    return flips.snapshots(tmp_path_factory.mktemp("starts"))
