"""What every adapter of another package's environment must keep to, as functions for the adapters' own tests."""

import hashlib
import json
import subprocess
import sys
import warnings
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env


def make(target: str, options: dict[str, Any]) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)(**options)


def gymnasium_finds_nothing(target: str, options: dict[str, Any]) -> None:
    """check_env of gymnasium passes and warns of nothing but unbounded or unsymmetric spaces."""
    name = "dipole-test/Adapter-v0"
    gymnasium.register(name, lambda **more: make(target, {**options, **more}))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for text in (".*symmetric and normalized", ".*infinity", ".*not within the obs space.*render"):
                warnings.filterwarnings("ignore", message=text)
            env = gymnasium.make(name).unwrapped
            check_env(env, skip_render_check=True)
        env.close()
    finally:
        gymnasium.registry.pop(name)


def fingerprint(env: Any, seed: int, steps: int = 100) -> str:
    """A hash of the bits of an episode under smooth random actions drawn from the seed."""
    rng, seen = np.random.default_rng(seed), hashlib.sha1()
    space, (obs, _) = env.action_space, env.reset(seed=seed)
    action = np.zeros(space.shape)
    for _ in range(steps):
        action = 0.9 * action + 0.1 * rng.uniform(space.low, space.high) * 3
        obs, reward, terminated, truncated, info = env.step(action)
        seen.update(b"".join(np.ascontiguousarray(obs[key]).tobytes() for key in sorted(obs)) + np.float64(reward).tobytes())
        assert type(info["success"]) is bool and type(terminated) is bool and type(truncated) is bool
        assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in obs.values())
    return seen.hexdigest()


def fingerprints_elsewhere(target: str, options: list[dict[str, Any]], seed: int, steps: int = 100) -> list[str]:
    """The fingerprint of the first episode of a new environment, for each set of options, computed in another process."""
    code = (
        "import json, sys; from tests.envs.contract import fingerprint, make; target, options, seed, steps = json.loads(sys.argv[1]); "
        "print(json.dumps([fingerprint(make(target, each), seed, steps) for each in options]))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps([target, options, seed, steps])], capture_output=True, text=True, check=True)
    assert not done.stderr, f"importing it is not quiet: {done.stderr}"
    return json.loads(done.stdout)


def starts_are_functions_of_the_seed(target: str, options: dict[str, Any], steps: int = 100) -> None:
    """The same seed begins and continues alike after other episodes and in another process; other seeds begin otherwise."""
    env = make(target, options)
    starts = [env.reset(seed=seed)[0] for seed in (100_000, 100_001, 7, 100_000)]
    flat = [np.concatenate([start[key].ravel() for key in sorted(start)]) for start in starts]
    np.testing.assert_array_equal(flat[0], flat[3])
    assert all((flat[i] != flat[j]).any() for i in range(3) for j in range(i))
    for key, value in starts[0].items():
        assert env.observation_space[key].contains(value), key
    unseeded = [np.concatenate([v.ravel() for v in env.reset()[0].values()]) for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()
    here = [fingerprint(env, seed, steps) for seed in (7, 100_000)]
    assert here[1:] == fingerprints_elsewhere(target, [options], 100_000, steps) and here[0] != here[1]


def success_rate(env: Any, seeds: range, noise: float = 0.0) -> tuple[float, list[int]]:
    """Of the environment's expert: share of seeds, and the lengths [steps] of the episodes that succeed."""
    from envs.collect import KEEP, run

    episodes = [run(env, seed, noise) for seed in seeds]
    lengths = [len(each["action"]) - KEEP for each in episodes if each]
    return len(lengths) / len(seeds), lengths
