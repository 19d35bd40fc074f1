"""A sampler is its table: every path and sampler against the sampler itself, and what the host makes of promised actions against torch."""
import json
from functools import partial

import numpy as np
import pytest
import torch

from policy.diffusion import rtc
from policy.diffusion import samplers as S
from policy.diffusion.from_diffusers import scheduler
from policy.diffusion.path import VE, VP, Cosine, Linear, Table
from policy.serve.probe import tabulate
from policy.serve.solver import Solver, check_prefix, kept, noises, promised
from policy.timeline import soft_mask
from tests.serve.small import small

PATHS = {"cosine": Cosine(), "vp": VP(), "ve": VE(), "linear": Linear(), "table": Table.named("squaredcos_cap_v2", 20)}
OURS = {"ddim": (S.first_order, 5), "heun": (S.heun, 4), "dpmpp_2m": (S.dpmpp_2m, 5), "jump": (S.consistency, 1)}
THEIRS = {"vp": ("UniPCMultistep", "DEISMultistep", "HeunDiscrete", "DPMSolverMultistep"), "linear": ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"),
          "ve": ("EDMEuler", "EDMDPMSolverMultistep")}
STOCHASTIC = {"ddpm": (partial(S.first_order, eta=1.0), 5, 4), "consistency": (S.consistency, 3, 2), "langevin": (partial(S.langevin, repeats=2), 3, 6)}


def walked(table: Solver, answer, noise: np.ndarray) -> np.ndarray:
    """What the table says, in double precision; noise (1 + draws, n)."""
    terms = list(noise)
    for row, tau in zip(table.rows, table.taus, strict=True):
        terms.append(answer(row @ np.array(terms), tau))
    return table.final @ np.array(terms)


def check(planner, noise: np.ndarray, tolerance: float = 1e-6) -> Solver:
    table, path, drawn = tabulate(planner), planner.denoiser.path, iter(torch.from_numpy(noise[1:])[:, None, :, None])
    options = {"draw": lambda x: planner.temperature * next(drawn)} if planner.noisy else {}
    start = planner.temperature * path.start_std(planner.taus[0]) * torch.from_numpy(noise[0])[None, :, None]
    want = planner.sampler(lambda x, tau, cond: torch.sin(3 * x + tau[0]), path, start, planner.taus, None, **options).flatten().numpy()
    got = walked(table, lambda x, tau: np.sin(3 * x + tau), noise)
    np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max()))
    assert abs(want).max() > 0.1
    return table


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", OURS)
def test_every_deterministic_sampler_is_its_table(path, sampler):
    fn, steps = OURS[sampler]
    planner = small(path=PATHS[path], sampler=fn, steps=steps)
    table = check(planner, np.random.default_rng(0).standard_normal((1, 9)))
    assert table.draws == 0 and table.calls == planner.calls
    np.testing.assert_allclose(table.taus[0], planner.taus[0])
    a, s = planner.denoiser.path.at(torch.from_numpy(table.taus), torch.zeros(len(table.taus)))
    np.testing.assert_allclose(np.stack([table.alphas, table.sigmas]), np.stack([a, s]), atol=1e-12)


@pytest.mark.parametrize("path, name", [(p, n) for p, names in THEIRS.items() for n in names])
def test_so_are_diffusers_schedulers(path, name):
    check(small(path=PATHS[path], sampler=scheduler(name), steps=6), np.random.default_rng(0).standard_normal((1, 9)), 1e-5)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_stochastic_sampler_takes_its_draws_as_noise(sampler):
    fn, steps, draws = STOCHASTIC[sampler]
    planner = small(sampler=fn, steps=steps, temperature=0.7)
    assert check(planner, np.random.default_rng(0).standard_normal((1 + draws, 9))).draws == draws


def test_a_sampler_that_is_not_linear_is_told():
    def thresholding(denoise, path, x, taus, cond=None):
        return (x := S.first_order(denoise, path, x, taus, cond)) / x.abs().amax().clamp_min(1)

    with pytest.raises(ValueError, match=r"not linear.*sampler=ddim"):
        tabulate(small(sampler=thresholding))


def test_a_table_survives_json_and_a_torn_one_is_refused():
    table = tabulate(small(sampler=S.heun))
    text = json.loads(json.dumps(table.to_json()))
    again = Solver.from_json(text)
    assert all(np.array_equal(a, b) for a, b in zip((table.taus, table.final, *table.rows), (again.taus, again.final, *again.rows), strict=True))
    for key in ("taus", "final", "rows", "alphas"):
        with pytest.raises(ValueError, match="does not belong"):
            Solver.from_json({**text, key: text[key][:-1]})


def test_the_walk_is_the_planner():
    planner = small(path=VP(), sampler=S.heun, limits=())
    noise = np.random.default_rng(0).standard_normal((1, 7, 3), np.float32)
    cond = planner.encode({k: torch.ones(1, 2, *size) for k, size in planner.spec.obs.items()})
    table = tabulate(planner)

    def step(i: int, x: np.ndarray) -> np.ndarray:
        return planner.denoiser(torch.from_numpy(x)[None], torch.tensor([table.taus[i]], dtype=torch.float32), cond)[0].numpy()

    want = planner.normalizer.encode({"action": planner.sample({k: torch.ones(1, 2, *size) for k, size in planner.spec.obs.items()}, cond,
                                                               noise=torch.from_numpy(noise))})["action"][0].numpy()
    np.testing.assert_allclose(table.walk(step, noise), want, atol=2e-5)


@pytest.mark.parametrize("limit, prior", [(5.0, 1.0), (2.0, 0.3)])
def test_identity_pulls_as_torch_does(limit, prior):
    planner = small(path=VP())
    table, generator = tabulate(planner), torch.Generator().manual_seed(0)
    known, x0 = torch.randn(1, 5, 3, generator=generator), torch.randn(1, 7, 3, generator=generator)
    told = promised(table, (7, 3), known[0].numpy(), 2, "identity", limit=limit, prior=prior)
    whole = torch.cat([known, torch.zeros(1, 2, 3)], 1)
    for i, tau in enumerate(table.taus):
        weight = torch.from_numpy(soft_mask(7, 2, 5)).float()[:, None]
        reference = rtc.identity(lambda x, tau, cond: x0, planner.denoiser.path, whole, weight, limit=limit, prior=prior)
        want = reference(x0, torch.tensor([tau], dtype=torch.float32), None)[0].numpy()
        np.testing.assert_allclose(x0[0].numpy() + told.pull[i] * (told.known - x0[0].numpy()), want, atol=1e-5)
    assert not told.mask.any() and told.pull.any() and not told.pull[:, 5:].any()


def test_what_is_promised_for_each_merge():
    table = tabulate(small())
    known = np.ones((4, 3), np.float32)
    frozen, told, naive = (promised(table, (7, 3), known, 2, merge) for merge in ("frozen", "prefix", "naive"))
    assert frozen.mask[:, 0].tolist() == told.mask[:, 0].tolist() == [True] * 2 + [False] * 5 and told.told and not frozen.told
    assert not naive.mask.any() and not naive.pull.any() and not frozen.pull.any()
    plan = kept(np.zeros((7, 3)), known, 2, "frozen")
    assert (plan[:2] == 1).all() and not plan[2:].any() and not kept(np.zeros((7, 3)), known, 2, "naive").any()


@pytest.mark.parametrize("change, words", [
    ({"merge": "guided"}, "gradient.*serve the run itself"), ({"merge": "sudden"}, "unknown; use one of naive"), ({"committed": 6}, "among the 5"),
    ({"committed": -1}, "among the 5"), ({"prefix": np.zeros((8, 3))}, "horizon 7"), ({"prefix": np.zeros((5, 2))}, r"\(p, 3\)"),
    ({"prefix": None, "committed": 1}, "among the 0"), ({"merge": "prefix", "committed": 3}, "from 3 known steps, and this policy learned to from 2")])
def test_a_wrong_promise_is_told(change, words):
    merges = ("naive", "frozen", "prefix")
    with pytest.raises(ValueError, match=words):
        check_prefix(**{"prefix": np.zeros((5, 3)), "committed": 2, "merge": "frozen", "size": (7, 3), "merges": merges, "rtc": 2, **change})


def test_noise_fixes_the_draws():
    first = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    whole = noises(first, (7, 3), 2)
    assert whole.shape == (3, 7, 3) and np.array_equal(whole, noises(first, (7, 3), 2)) and np.array_equal(noises(whole, (7, 3), 2), whole)
    assert not np.array_equal(whole[1:], noises(first + 1, (7, 3), 2)[1:]) and not np.array_equal(noises(None, (7, 3), 0), noises(None, (7, 3), 0))
    with pytest.raises(ValueError, match=r"noise must be \(7, 3\)"):
        noises(first[:-1], (7, 3), 0)
