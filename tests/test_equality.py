"""Several processes, whose parts of every array lie apart: gradients and weights of one device.

Meshes of one process are held to it in tests/methods/test_vbon.py; the program prints all of them.
"""

from tests import equality
from vbon_jax import sharding


def test_four_processes_give_what_one_device_gives():
    one = equality.found(sharding.make_mesh())
    furthest = equality.of_processes(equality.PROCESSES["4 processes"]).furthest(one)
    assert furthest.pop("tokens") == 0
    assert furthest.pop("params") < 3e-5  # Adam's step is 5e-3, however small its gradient is
    assert all(value < 1e-5 for value in furthest.values()), furthest
    assert max(abs(g).max() for g in one.gradients.values()) > 1e-2  # there is something to differ
