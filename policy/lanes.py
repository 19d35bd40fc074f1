"""Evaluation on several cores: while one lane plans, the physics and the plans of the others go on. Threads suffice: torch and MuJoCo hold no lock."""
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np

from policy.control import Controller
from policy.episodes import Episode, Report
from policy.rollout import Keep, evaluate, play, single_plans

Lane = tuple[Controller, Any]  # and its own vector environment


def evaluate_in_lanes(lanes: Sequence[Lane], episodes: int, seed: int, *, task: str = "", until: float | None = None,
                      on_progress: Callable[[int], None] = lambda done: None, keep: Keep | None = None) -> Report:
    """`evaluate` of the same episodes, each lane playing its share of the seeds at once. Lanes may share a planner, nothing else.

    The report is as evaluate's, but for env_s and plan_s, which are sums over lanes that ran at the same time. Give torch one thread.
    ValueError as evaluate's, and for until evaluate's, with more than one lane.
    """
    if len(lanes) == 1:
        return evaluate(*lanes[0], episodes, seed, task=task, until=until, on_progress=on_progress, keep=keep)
    if until is not None:
        raise ValueError("until looks when all copies have finished: use it with lanes=1")
    lanes = lanes[:episodes]
    starts: dict[bytes, int] = {}
    first, done, lock = [int(x) for x in np.linspace(0, episodes, len(lanes) + 1)], [0] * len(lanes), Lock()

    def one(i: int) -> Report:
        def show(finished: int) -> None:
            with lock:
                done[i] = finished
                on_progress(sum(done))

        def one_at_a_time(episode: Episode) -> None:
            assert keep
            with lock:
                keep(episode)
        return play(*lanes[i], first[i + 1] - first[i], seed + first[i], task=task, on_progress=show, starts=starts, keep=one_at_a_time if keep else None)

    cpu = time.process_time()
    with ThreadPoolExecutor(len(lanes)) as pool:
        reports = list(pool.map(one, range(len(lanes))))
    whole = reports[0]
    for report in reports[1:]:
        whole.episodes += report.episodes
        whole.plan_s += report.plan_s
        whole.env_s += report.env_s
        whole.wall_s = max(whole.wall_s, report.wall_s)
    whole.cpu_s = time.process_time() - cpu
    whole.plan_one_s = single_plans(lanes[0][0])  # now that nothing else runs
    return whole
