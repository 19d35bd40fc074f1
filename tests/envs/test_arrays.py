"""Every task's pure functions: the same on numpy and on torch, with any leading axes, and inputs left alone."""

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace

from envs.arrays import clip, like
from envs.simulator import State
from tests.envs.own import flat, own_tasks, played

TASKS = [name for name in own_tasks()]


def on_torch(state: State, dtype: torch.dtype = torch.float64) -> State:
    return State(*(torch.tensor(value, dtype=dtype) for value in (state.qpos, state.qvel, state.mocap_pos)))


def compare(ours: dict, theirs: dict, shape: tuple[int, ...]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        other = theirs[key].numpy()
        assert value.shape[: len(shape)] == shape and other.dtype == value.dtype and other.shape == value.shape, key
        if value.dtype == np.float32:  # rounded from numbers that differ in the last bits of a float64
            np.testing.assert_array_max_ulp(value, other, 1)
        else:
            np.testing.assert_allclose(other, value, rtol=0, atol=1e-12, err_msg=key)


def judged(task, state: State) -> dict:
    reward, success, metrics = task.outcome(state)
    return {"reward": reward, "success": success, **metrics}


@pytest.mark.parametrize("name", TASKS)
def test_numpy_and_torch_agree(name):
    task, (states, actions) = own_tasks()[name](), played(name, 60)
    compare(task.observe(states), task.observe(on_torch(states)), (4, 61))
    compare(judged(task, states), judged(task, on_torch(states)), (4, 61))
    wild = 2 * actions - actions.mean()  # beyond the bounds too
    compare({"ctrl": task.control(wild)}, {"ctrl": task.control(torch.tensor(wild))}, (4, 60))
    assert judged(task, states)["reward"].dtype == np.float64 and judged(task, states)["success"].dtype == bool


@pytest.mark.parametrize("name", TASKS)
def test_leading_axes_are_kept(name):
    task, (states, actions) = own_tasks()[name](), played(name, 60)
    for convert in (lambda state: state, on_torch):
        many, few = convert(flat(states)), convert(states)
        alone = few[2, 33]
        for function in (task.observe, lambda state: judged(task, state)):
            together, apart, single = function(few), function(many), function(alone)
            for key, value in together.items():
                xp = array_namespace(value)
                assert xp.all(xp.reshape(apart[key], value.shape) == value), key
                assert single[key].shape == value.shape[2:], key
                np.testing.assert_allclose(np.asarray(single[key], float), np.asarray(value[2, 33], float), rtol=0, atol=1e-6)
    assert task.control(actions[0, 0]).tolist() == task.control(actions)[0, 0].tolist()


@pytest.mark.parametrize("name", TASKS)
def test_float32_in_on_the_way_to_a_gpu(name):
    task, (states, _) = own_tasks()[name](), played(name, 60)
    seen, precise = task.observe(on_torch(states, torch.float32)), task.observe(states)
    for key, value in seen.items():
        assert value.dtype == torch.float32
        scale = np.abs(precise[key]).max()
        wrong = np.abs(value.numpy() - precise[key]) > 1e-5 * scale
        assert wrong.mean() < 0.01, key  # an angle may wrap elsewhere
    assert judged(task, on_torch(states, torch.float32))["success"].dtype == torch.bool


@pytest.mark.parametrize("name", TASKS)
def test_inputs_are_left_alone(name):
    task, (states, actions) = own_tasks()[name](), played(name, 60)
    before = [value.copy() for value in (states.qpos, states.qvel, states.mocap_pos, actions)]
    task.observe(states), task.outcome(states), task.control(actions)
    assert all((a == b).all() for a, b in zip(before, (states.qpos, states.qvel, states.mocap_pos, actions), strict=True))


def test_clip_is_numpys():
    x = np.random.default_rng(0).normal(size=(5, 3))
    low, high = [-0.5, 0.0, -1.0], np.array([0.5, 0.1, 2.0], np.float32)
    assert (clip(x, low, high) == np.clip(x, low, high)).all() and (clip(x, low) == np.maximum(x, low)).all() and (clip(x, high=0) == np.minimum(x, 0)).all()
    assert (clip(torch.tensor(x), low, high).numpy() == clip(x, low, high)).all()
    assert like([1, 2], torch.zeros(2, dtype=torch.float32)).dtype == torch.float32
