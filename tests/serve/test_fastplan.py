"""FastPlan's answers are PlannerBackend's, whatever came before and whoever asks at the same time."""
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from policy.diffusion import samplers as S
from policy.diffusion.guides import smooth, tilt
from policy.diffusion.path import VE, VP, Linear, Table
from policy.nets.fast import quick
from policy.serve.backend import PlannerBackend, seen_range
from policy.serve.fastplan import FastPlan, GraphLoop
from policy.serve.probe import tabulate
from tests.serve.small import asked, small

MERGES = ("naive", "ensemble", "frozen", "identity", "guided")


def apart(planner, a: np.ndarray, b: np.ndarray) -> float:
    low, high = map(np.array, seen_range(planner))
    return float((np.abs(a - b) / (high - low) * 2).max())


def agree(planner, fast: FastPlan, merges=MERGES, tolerance: float = 1e-5, known: int = 5, warm: float | None = None) -> None:
    ordinary = PlannerBackend(planner, warm=warm)
    for seed, merge in enumerate([*merges, "naive"]):  # the last shows that nothing stays behind
        obs, noise, prefix = asked(planner.spec.horizon, seed, known)
        told = {"noise": noise, "prefix": prefix, "committed": min(2, known), "merge": merge}
        assert apart(planner, fast.plan(obs, **told), ordinary.plan(obs, **told)) < tolerance, merge


@pytest.mark.parametrize("options", [
    {}, {"horizon": 8, "path": VP(), "sampler": S.heun}, {"path": Linear(), "target": "flow", "steps": 10},
    {"path": VE(), "target": "edm", "sampler": S.dpmpp_2m, "limits": (), "width": 5},
    {"path": Table.named("squaredcos_cap_v2", 20), "target": "x0", "limits": (1.5, 0.8)}, {"horizon": 6, "sampler": partial(S.first_order, eta=1.0)},
    {"sampler": S.consistency, "steps": 3, "temperature": 0.5}])
def test_plans_as_the_planner_does(options):
    planner = small(**options)
    fast = FastPlan(PlannerBackend(planner))
    assert not fast.lacks
    agree(planner, fast)


@pytest.mark.parametrize("options", [{"steps": 6}, {"sampler": S.heun, "rtc": 3, "horizon": 8}, {"sampler": partial(S.first_order, eta=1.0), "steps": 6}])
def test_a_warm_start_is_as_quick(options):
    planner = small(**options)
    fast = FastPlan(PlannerBackend(planner, warm=0.6))
    assert not fast.lacks and fast.loops[1].solver.calls < fast.loops[0].solver.calls
    agree(planner, fast, warm=0.6)
    obs, noise, prefix = asked(planner.spec.horizon)
    cold = FastPlan(PlannerBackend(planner))
    assert apart(planner, fast.plan(obs, noise=noise, prefix=prefix), cold.plan(obs, noise=noise, prefix=prefix)) > 1e-3
    assert np.array_equal(fast.plan(obs, noise=noise), cold.plan(obs, noise=noise))


def test_a_policy_that_is_told_its_prefix():
    planner = small(rtc=3, horizon=8)
    fast = FastPlan(PlannerBackend(planner))
    assert not fast.lacks and "prefix" in fast.card.merges
    agree(planner, fast, (*MERGES, "prefix"))
    obs, noise, prefix = asked(8)
    plans = {merge: fast.plan(obs, noise=noise, prefix=prefix, committed=2, merge=merge) for merge in ("frozen", "prefix")}
    assert apart(planner, plans["frozen"], plans["prefix"]) > 1e-3  # the flag says something


def test_committed_steps_are_kept_to_the_bit():
    fast = FastPlan(PlannerBackend(small()))
    obs, noise, prefix = asked()
    for merge in ("frozen", "identity", "guided"):
        assert np.array_equal(fast.plan(obs, noise=noise, prefix=prefix, committed=3, merge=merge)[:3], prefix[:3])
    assert not np.isclose(fast.plan(obs, noise=noise, prefix=prefix, committed=3)[:3], prefix[:3]).any()


def test_the_settings_of_guidance_count():
    planner = small()
    obs, noise, prefix = asked()
    told = {"noise": noise, "prefix": prefix, "committed": 1, "merge": "identity"}
    gentle, firm = (PlannerBackend(planner, limit=50.0, prior=p) for p in (1.0, 0.2))
    assert apart(planner, FastPlan(firm).plan(obs, **told), firm.plan(obs, **told)) < 1e-5
    assert apart(planner, FastPlan(gentle).plan(obs, **told), firm.plan(obs, **told)) > 1e-3


@pytest.mark.parametrize("make, why", [
    (lambda: PlannerBackend(small("dit")), "unet1d"),
    (lambda: PlannerBackend(tilted()), "guide tilt"), (lambda: PlannerBackend(hurried()), "fp32 alone")])
def test_what_it_cannot_hasten_goes_the_ordinary_way(make, why):
    ordinary = make()
    fast = FastPlan(ordinary)
    assert why in fast.lacks
    obs, noise, prefix = asked()
    told = {"noise": noise, "prefix": prefix, "committed": 2, "merge": "frozen"}
    assert np.array_equal(fast.plan(obs, **told), ordinary.plan(obs, **told))


def tilted():
    planner = small()
    planner.set_guides([*planner.guides, partial(tilt, value=smooth, scale=0.1)])
    return planner


def hurried():
    planner = small()
    planner.denoiser.net = quick(planner.denoiser.net)
    return planner


def test_two_threads_get_what_each_gets_alone():
    fast = FastPlan(PlannerBackend(small()))
    alone = [fast.plan(obs, noise=noise) for obs, noise, _ in (asked(seed=s) for s in range(8))]

    def plan(seed: int) -> np.ndarray:
        obs, noise, _ = asked(seed=seed)
        return fast.plan(obs, noise=noise)

    with ThreadPoolExecutor(4) as threads:
        assert all(np.array_equal(a, b) for a, b in zip(alone, threads.map(plan, range(8)), strict=True))


def test_wrong_arguments_are_told():
    fast = FastPlan(PlannerBackend(small()))
    obs, noise, prefix = asked()
    with pytest.raises(ValueError, match=r"noise must be \(7, 3\), got \(6, 3\)"):
        fast.plan(obs, noise=noise[:-1])
    with pytest.raises(ValueError, match="among the 5"):
        fast.plan(obs, noise=noise, prefix=prefix, committed=6, merge="frozen")


@pytest.mark.parametrize("net, rtc", [("unet1d", 3), ("dit", 0), ("mlp", 0)])
def test_the_loop_of_gpus_is_the_planner_too(net, rtc):
    planner = small(net, 8, rtc=rtc, sampler=partial(S.first_order, eta=0.5))
    fast = FastPlan(PlannerBackend(planner))
    fast.loops = [GraphLoop(planner, tabulate(planner))]  # without a GPU it runs as it would be captured
    agree(planner, fast, ("naive", "frozen", "identity", *(("prefix",) if rtc else ())))
    fast.loops = [GraphLoop(planner, tabulate(planner, warm)) for warm in (None, 0.6)]
    agree(planner, fast, ("naive", "frozen", "identity", *(("prefix",) if rtc else ())), warm=0.6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph: needs an NVIDIA GPU")
@pytest.mark.parametrize("net", ["unet1d", "dit", "mlp"])
def test_a_captured_graph_plans_as_the_planner_does(net):
    planner = small(net, 8, steps=6).to("cuda")
    for warm in (None, 0.6):
        fast = FastPlan(PlannerBackend(planner, warm=warm))
        assert all(isinstance(loop, GraphLoop) and loop.graph is not None for loop in fast.loops)
        agree(planner, fast, tolerance=1e-4, warm=warm)
