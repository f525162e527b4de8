import dataclasses

import pytest

from specbatch.config import Config
from specbatch.config.change import FIXED, FIXED_SECTIONS, FREE, STEPS, changes, refuse_fixed
from specbatch.config.load import config_options
from specbatch.config.sections import Data, Run, Target
from specbatch.errors import UserError


def config(**sections):
    made = Config(run=Run("run"), target=Target("target"), data=Data(["talks"]))
    replaced = {name: dataclasses.replace(getattr(made, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(made, **replaced)


def refused(schedule="cosine", trained=0, **sections):
    refuse_fixed(changes(config(), config(**sections)), schedule, trained)


def test_every_field_that_is_named_is_there():
    assert {*FREE, *FIXED, STEPS} <= set(config_options())
    assert {name.split(".")[0] for name in FREE} <= set(FIXED_SECTIONS)


def test_changes_name_field_old_and_new_value_in_order():
    found = changes(config(), config(snapshot={"keep": 3}, run={"log_interval_s": 1.0}))
    assert [(change.field, change.was, change.now) for change in found] == [
        ("run.log_interval_s", 10.0, 1.0),
        ("snapshot.keep", 2, 3),
    ]
    assert changes(config(), config()) == []


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"log_interval_s": 1.0, "stall_timeout_s": 60.0}},
        {"inference": {"engines": 4, "heartbeat_s": 1.0, "sglang": {"mem_fraction_static": 0.5}}},
        {"training": {"ranks": 2, "prefetch_steps": 1, "evaluate_interval_steps": 5}},
        {"snapshot": {"keep": 5}, "data": {"workers": 1}, "evaluate": {"prompts": 0}},
    ],
)
def test_what_changes_no_step_may_change(sections):
    refused(**sections)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("run", "seed", 1),
        ("target", "dtype", "float32"),
        ("data", "max_tokens", 8),
        ("draft", "ttt_steps", 2),
        ("training", "learning_rate", 1.0),
        ("training", "packs_per_step", 4),
        ("training", "epochs", 2),
        ("training", "max_steps", 50),
        ("inference", "deterministic", True),
    ],
)
def test_another_training_is_refused_by_field_old_and_new_value(section, field, value):
    before = getattr(getattr(config(), section), field)
    with pytest.raises(UserError, match=rf"{section}\.{field} was {before} and would be {value}"):
        refused(**{section: {field: value}})


def test_all_that_is_refused_is_named_at_once():
    with pytest.raises(UserError, match=r"run\.seed was 0 and would be 1; training\.epochs was 1 and would be 3"):
        refused(run={"seed": 1}, training={"epochs": 3, "ranks": 4})


def test_the_number_of_steps_may_change_where_no_learning_rate_depends_on_it():
    refused(schedule="constant", trained=10, training={"max_steps": 10})
    with pytest.raises(UserError, match="9 is less than the 10 steps that are already trained"):
        refused(schedule="constant", trained=10, training={"max_steps": 9})
    with pytest.raises(UserError, match="the learning rate of every step depends on their number"):
        refused(schedule="cosine", trained=10, training={"max_steps": 20})
