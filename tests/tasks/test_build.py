import sys

import pytest

from kdbench.errors import UserError
from kdbench.tasks import TASKS
from kdbench.tasks.build import TaskSpec, build_task
from kdbench.tasks.classification import Classification

SMALL = {"name": "shapes", "target": "class", "train": 12, "test": 4, "size": 16}


class Mine(Classification):
    name = "mine"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file under a name that a dotted path can use."""
    monkeypatch.setitem(sys.modules, "my_task", sys.modules[__name__])


def build(spec):
    return build_task(TaskSpec.model_validate(spec))


def test_the_same_spec_gives_the_same_task_whatever_the_order_of_its_keys():
    one = build({"name": "classification", "data": SMALL, "val_size": 3})
    assert build({"val_size": 3, "data": dict(reversed(SMALL.items())), "name": "classification"}) is one
    assert build({"name": "classification", "data": SMALL, "val_size": 4}) is not one


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_the_catalogue_is_built_from_its_name_alone(name):
    task = build(name)
    assert task.name == name
    assert len(task.splits().train) > len(task.splits().val) > 0


def test_a_users_task_works_by_dotted_path():
    assert build({"name": "my_task:Mine", "data": SMALL}).name == "mine"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("classificaton", "unknown task 'classificaton'; did you mean 'classification'"),
        ({"name": "classification", "dta": "shapes"}, "task 'classification': unknown key 'dta'; did you mean 'data'"),
        ({"name": "classification", "val_size": 1.5}, "val_size: a share must lie between 0 and 1.*got 1.5"),
        ({"name": "classification", "val_size": "some"}, "val_size: expected a number of samples or a share.*got 'some'"),
        ({"name": "classification", "val_size": 0}, "val_size: expected at least one sample, got 0"),
        ({"name": "classification", "transfer_size": 0}, "transfer_size: expected greater than or equal to 1, got 0"),
        ({"name": "classification", "data": "fashion"}, "unknown data 'fashion'; did you mean 'fashion_mnist'"),
        ({"name": "classification", "data": {"size": 3}}, "key 'data.name' is missing"),
        ("my_task:build", "task 'my_task:build' must be a subclass of kdbench.tasks.base.Task"),
    ],
)
def test_a_wrong_spec_is_one_readable_line(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        build(spec)
    assert "\n" not in str(caught.value)
