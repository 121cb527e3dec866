"""The records of the stages, from which the command line, the config and the workdir read."""

import importlib
from pathlib import Path

import pytest

from vbon_jax import cli, config, stages
from vbon_jax.stages import COMMANDS, STAGES


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_a_module_with_its_work(name):
    stage = STAGES[name]
    assert stage.name == name
    module = importlib.import_module(f"vbon_jax.stages.{name}")
    assert stage.run is module.run and callable(module.run)
    assert stage.help and "\n" not in stage.help


def test_stages_come_after_those_they_read():
    seen = []
    for name, stage in STAGES.items():
        assert set(stage.after) <= set(seen), name
        seen.append(name)


def test_no_two_stages_leave_the_same_path():
    """Nor a path within another's: removing one stage's results must leave all others."""
    leaves = [Path(path) for stage in STAGES.values() for path in stage.leaves]
    assert all(stage.leaves for stage in STAGES.values())
    for i, a in enumerate(leaves):
        for b in leaves[:i]:
            assert not a.is_relative_to(b) and not b.is_relative_to(a), (a, b)


def test_what_stages_depend_on_are_keys():
    known = [*config.defaults_flat()]
    for name, stage in STAGES.items():
        for key in stage.depends:
            assert any(k == key or k.startswith(f"{key}.") for k in known), (name, key)


def test_a_stage_follows_from_all_that_those_before_follow_from():
    for stage in STAGES.values():
        found = stage.follows(STAGES)
        assert len(set(found)) == len(found) and set(stage.depends) <= set(found)
        for before in stage.after:
            assert set(STAGES[before].follows(STAGES)) <= set(found)
    assert STAGES["sft"].follows(STAGES) == STAGES["sft"].depends


def test_commands_are_no_stages():
    assert not COMMANDS.keys() & STAGES.keys()
    assert cli.commands().keys() == COMMANDS.keys() | STAGES.keys()
    assert set(config.Config().stages) <= STAGES.keys()


def test_help_has_a_line_for_each(capfd):
    assert cli.main(["--help"]) == 0
    lines = [line.split(None, 1) for line in capfd.readouterr().out.splitlines()]
    told = COMMANDS | {name: stage.help for name, stage in STAGES.items()}
    for name, text in told.items():
        assert lines.count([name, text]) == 1, name


def test_every_file_of_a_stage_is_recorded():
    """A module with ``run`` is a stage or a command, so none is out of reach."""
    files = Path(stages.__file__).parent.glob("*.py")
    found = {path.stem for path in files if "\ndef run(" in path.read_text()}
    assert found == STAGES.keys() | {"plan", "generate"} and found <= cli.commands().keys()
