"""What a config key is: declared with its default, its doc and its rules."""

import dataclasses
from typing import Any

import pytest

from vbon_jax import keys
from vbon_jax.errors import InputError
from vbon_jax.keys import group, key, named


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int = key(3, "Layers.", least=1)
    width: int = key(8, "Width.", least=1, most=64)


@dataclasses.dataclass(frozen=True)
class Part:
    weight: float = key(1.0, "Weight.")


@dataclasses.dataclass(frozen=True)
class Everything:
    rate: float = key(0.5, "Rate.", above=0, below=1)
    form: str = key("hard", "Form.", choices=("hard", "soft"))
    whole: tuple[int, ...] = key((), "Whole numbers.")
    real: tuple[float, ...] = key((1.0,), "Real numbers.")
    names: tuple[str, ...] = key(("q",), "Names.")
    on: bool = key(True, "Whether.")
    small: Size = group(Size, layers=1)
    large: Size = group(Size)
    parts: dict[str, Part] = named(Part, "Parts.")


@dataclasses.dataclass(frozen=True)
class VBoN:
    """As a method's options in the Python API."""

    n: float = key(8.0, "The n.", least=1)
    grid: tuple[float, ...] = key((), "Values of n.")

    def __post_init__(self) -> None:
        keys.check(self, "VBoN")


def test_what_is_not_given_takes_the_default_of_its_place():
    assert keys.build(Everything, {}) == Everything()
    built = keys.build(
        Everything, {"small": {"width": 4}, "large": {"width": 2}, "parts": {"a": {}}}
    )
    assert built.small == Size(1, 4) and built.large == Size(3, 2)
    assert built.parts == {"a": Part(1.0)}


def test_values_are_converted_to_their_types():
    built = keys.build(Everything, {"real": [1, 2.5], "whole": [3], "parts": {"a": {"weight": 2}}})
    assert built.real == (1.0, 2.5) and all(isinstance(x, float) for x in built.real)
    assert built.whole == (3,) and isinstance(built.whole[0], int)
    assert isinstance(built.parts["a"].weight, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rat": 1}, "unknown config key rat: allowed here are rate, form, whole, real, names,"),
        ({"small": {"depth": 1}}, "unknown config key small.depth: allowed here are small.layers"),
        ({"parts": {"a": {"w": 1}}}, "unknown config key parts.a.w: allowed here are parts.a.w"),
        ({"rate": 0}, "rate=0.0: must be above 0"),
        ({"rate": 1.0}, "rate=1.0: must be below 1"),
        ({"rate": "fast"}, "rate='fast': must be float"),
        ({"rate": True}, "rate=True: must be float"),
        ({"rate": float("inf")}, "rate=inf: must be a finite number"),
        ({"form": "loud"}, "form='loud': choose one of hard, soft"),
        ({"form": 1}, "form=1: must be str"),
        ({"on": 1}, "on=1: must be bool"),
        ({"whole": 3}, "whole=3: must be tuple"),
        ({"whole": (2.0,)}, "whole has 2.0: it must hold whole numbers"),
        ({"whole": (True,)}, "whole has True: it must hold whole numbers"),
        ({"real": ("1",)}, "real has '1': it must hold finite numbers"),
        ({"real": (float("nan"),)}, "real has nan: it must hold finite numbers"),
        ({"names": ("q", 1)}, "names has 1: it must hold strings"),
        ({"names": "q"}, "names='q': must be tuple"),
        ({"small": 3}, "small=3: must be a group of keys"),
        ({"small": {"layers": True}}, "small.layers=True: must be int"),
        ({"small": {"width": 65}}, "small.width=65: must be at most 64"),
        ({"parts": 3}, "parts=3: must be groups of keys, each under a name"),
        ({"parts": {"a": 3}}, "parts.a=3: must be a group of keys"),
        (3, "config=3: must be a group of keys"),
    ],
)  # fmt: skip
def test_bad_values_are_named(values: Any, message: str):
    with pytest.raises(InputError) as error:
        keys.build(Everything, values)
    assert str(error.value).startswith(message)


def test_names_start_with_where_the_group_stands():
    with pytest.raises(
        InputError, match=r"^unknown config key a\.b\.rat: allowed here are a\.b\.rate"
    ):
        keys.build(Everything, {"rat": 1}, "a.b")
    with pytest.raises(InputError, match=r"^a\.b\.small\.layers=0: must be at least 1"):
        keys.build(Everything, {"small": {"layers": 0}}, "a.b")


def test_an_instance_is_checked_like_a_dict():
    own = VBoN(n=4, grid=[1, 2])
    assert own == VBoN(4.0, (1.0, 2.0)) and isinstance(own.n, float)
    assert all(isinstance(n, float) for n in own.grid)
    for bad, message in (
        ({"n": 0.5}, "VBoN.n=0.5: must be at least 1"),
        ({"n": "4"}, "VBoN.n='4': must be float"),
        ({"grid": (1.0, "2")}, "VBoN.grid has '2': it must hold finite numbers"),
    ):
        with pytest.raises(InputError) as error:
            VBoN(**bad)
        assert str(error.value) == message
    assert keys.build(VBoN, {"n": 2}, "method") == VBoN(2.0)
    with pytest.raises(InputError, match=r"^method\.n=0\.0: must be at least 1"):
        keys.build(VBoN, {"n": 0}, "method")  # by its key, before the class's own name


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        (Everything(small=Size(0)), "small.layers=0: must be at least 1"),
        (Everything(small=3), "small=3: must be Size"),
        (Everything(parts={"a": Part("x")}), "parts.a.weight='x': must be float"),
        (Everything(parts={"a": {}}), "parts.a={}: must be Part"),
        (Everything(parts=3), "parts=3: must be groups of keys, each under a name"),
    ],
)
def test_groups_of_an_instance_are_checked(instance: Everything, message: str):
    keys.check(Everything(parts={"a": Part()}))
    with pytest.raises(InputError) as error:
        keys.check(instance)
    assert str(error.value) == message


def test_plain_values_come_back_as_they_were():
    own = Everything(whole=(1, 2), parts={"a": Part(2.0)})
    plain = keys.as_dict(own)
    assert plain["whole"] == [1, 2] and plain["parts"] == {"a": {"weight": 2.0}}
    assert keys.build(Everything, plain) == own
    flat = keys.flatten(plain)
    assert flat["small.layers"] == 1 and flat["parts.a.weight"] == 2.0 and "small" not in flat
    assert keys.flatten(keys.as_dict(Everything()))["parts"] == {}
    assert keys.flatten({"a": 1}, "b.") == {"b.a": 1}


def test_rows_list_every_key_with_its_default():
    found = keys.rows(Everything)
    assert found[0] == ("rate", "Rate.", 0.5)
    assert [name for name, _, _ in found[6:]] == [
        "small.layers", "small.width", "large.layers", "large.width", "parts", "parts.NAME.weight",
    ]  # fmt: skip
    assert found[6] == ("small.layers", "Layers.", 1) and found[8] == ("large.layers", "Layers.", 3)
    assert found[10:] == [("parts", "Parts.", {}), ("parts.NAME.weight", "Weight.", 1.0)]


@dataclasses.dataclass(frozen=True)
class Span:
    n: keys.SPAN = key(8.0, "A number or two.", least=1)


@pytest.mark.parametrize("given, found", [(4, 4.0), (2.5, 2.5), ([2, 64], (2.0, 64.0))])
def test_a_number_or_the_two_that_it_lies_between(given, found):
    built = keys.build(Span, {"n": given}).n
    assert built == found and isinstance(built, type(found))
    assert keys.build(Span, keys.as_dict(Span(found))) == Span(found)


@pytest.mark.parametrize(
    "given, message",
    [
        ((64, 2), r"n=\(64.0, 2.0\): must be a number, or two of which the first is less"),
        ((2, 4, 8), "must be a number, or two"),
        ((0.5, 4), r"n=0.5: must be at least 1"),
        ((2, "x"), "n has 'x': it must hold finite numbers"),
        ("x", "n='x': must be a number, or two, such as"),
    ],
)
def test_two_that_are_no_span_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        keys.build(Span, {"n": given})
