"""How work is divided into pages."""

from vbon_jax.sampling import pages, slots


def test_pages_hold_what_memory_and_work_ask_for():
    assert pages.shape_for(64, 100, 200, 8, 32) == slots.Shape(64, 64, 1, 200, 8)
    assert pages.shape_for(64, 1, 5_000, 8, 32).each == 250  # 4 x 64 at most, a divisor
    long = pages.shape_for(64, 1_000, 1, 1_024, 64)
    assert (long.prompts, long.group, long.held) == (64, 1, 1)
    assert pages.shape_for(64, 1_000, 1, 8, 64).prompts == 256
    assert pages.shape_for(64, 1, 64, 8, 64) == slots.Shape(64, 64, 1, 64, 8)
    few = pages.shape_for(512, 2, 3, 8, 32)
    assert (few.rows, few.responses, few.page) == (6, 6, 6)


def test_devices_share_the_prompts_out():
    many = pages.shape_for(64, 100, 200, 8, 32, devices=8)
    assert (many.rows, many.batch, many.each) == (8, 64, 25)  # 4 rows' worth of a prompt
    one = pages.shape_for(64, 1, 64, 8, 64, devices=8)  # of a single prompt each draws an eighth
    assert (one.each, one.prompts, one.page) == (8, 1, 64)
    assert pages.shape_for(64, 9, 8, 8, 64, devices=4).each == 4  # 18 halves: 5, 5, 5 and 3
    odd = pages.shape_for(64, 3, 1, 8, 64, devices=8)  # five devices have nothing to do
    assert (odd.rows, odd.prompts, odd.batch) == (1, 1, 8)
