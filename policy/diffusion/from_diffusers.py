"""Any deterministic diffusers scheduler, by name, as a sampler without state.

Without clipping a scheduler's step is linear in (x, model outputs so far). So its own `set_timesteps` and `step` are run once on
one-hot vectors in double precision, which reads off a triangular table of coefficients; sampling is then
x_i = sum_j c_ij (x_init, m_0 ... m_{i-1}) with the network as our Denoise. The table is constant: it compiles, captures and exports.
"""
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor

from policy.diffusion.path import VE, Linear, Path, Table, grid
from policy.diffusion.samplers import Sampler
from policy.types import Cond, Denoise

TRAIN_STEPS = 1000  # resolution at which a continuous path is shown to a discrete scheduler


@dataclass(frozen=True)
class Steps:
    """Network call i sees x = inputs[i] . (x_init, m_0 ... m_{i-1}) at taus[i] and yields m_i = from_x[i] x + from_x0[i] x0_hat.

    final . (x_init, m_0 ... m_{n-1}) is the sample.   n = network calls, which for Heun and PNDM is more than the steps asked for.
    """
    taus: tuple[float, ...]
    inputs: tuple[tuple[float, ...], ...]
    from_x: tuple[float, ...]
    from_x0: tuple[float, ...]
    final: tuple[float, ...]


def _scheduler(name: str, path: Path, options: tuple[tuple[str, object], ...]):
    cls = getattr(diffusers, name if name.endswith("Scheduler") else f"{name}Scheduler", None)
    if cls is None:
        known = sorted(n.removesuffix("Scheduler") for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n)
        raise ValueError(f"diffusers has no scheduler {name!r}; it has {', '.join(known)}")
    accepts = inspect.signature(cls.__init__).parameters
    family = "flow" if "FlowMatch" in name else "edm" if "EDM" in name else "vp"
    alpha, sigma = path.at(torch.linspace(0.05, 0.95, 19, dtype=torch.float64), torch.zeros(19))
    fits = {"flow": isinstance(path, Linear), "edm": isinstance(path, VE), "vp": bool(((alpha**2 + sigma**2 - 1).abs() < 1e-6).all())}[family]
    if not fits:
        need = {"flow": "schedule=linear", "edm": "schedule=ve", "vp": "a variance-preserving path (schedule=cosine, vp or table)"}[family]
        raise ValueError(f"{name} integrates {need}, not {type(path).__name__}; choose another sampler or train with that")
    kw: dict[str, object] = {}
    if family == "vp":
        if "trained_betas" not in accepts:
            raise ValueError(f"{name} brings its own noise schedule and cannot follow {type(path).__name__}; choose another scheduler")
        k = len(path.alphas_cumprod) if isinstance(path, Table) else TRAIN_STEPS
        bar = path.alpha(torch.arange(1, k + 1, dtype=torch.float64) / k * path.tau_max) ** 2
        betas = 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        kw = {"num_train_timesteps": k, "trained_betas": betas.tolist(), "prediction_type": "epsilon", "clip_sample": False,
              "thresholding": False, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    elif family == "edm":
        kw = {"sigma_max": path.hi, "rho": path.rho}  # type: ignore[attr-defined]
    return cls(**{k: v for k, v in kw.items() if k in accepts}, **dict(options)), family


def _probe(scheduler, name: str, steps: int) -> tuple[list[Tensor], Tensor]:
    """Coefficient rows (n+1,) of every network input and of the final sample."""
    dtype = torch.float32 if "UniPC" in name else torch.float64  # its linear solve mixes in float32
    scheduler.set_timesteps(steps)
    n = len(scheduler.timesteps)
    basis = torch.eye(n + 1, dtype=dtype)[:, None, :, None]
    x, inputs = basis[0] * float(getattr(scheduler, "init_noise_sigma", 1.0)), []
    draws = torch.random.get_rng_state()  # a stochastic scheduler is recognised by drawing
    for i, t in enumerate(scheduler.timesteps):
        inputs.append(scheduler.scale_model_input(x, t).flatten() if hasattr(scheduler, "scale_model_input") else x.flatten())
        x = scheduler.step(basis[i + 1], t, x).prev_sample.to(dtype)
        if not torch.equal(draws, torch.random.get_rng_state()):
            torch.random.set_rng_state(draws)
            raise ValueError(f"{name} is stochastic; use sampler=ddpm (first_order with eta=1), or a deterministic scheduler")
    return [r.double() for r in inputs], x.flatten().double()


@functools.lru_cache(maxsize=64)
def compile_scheduler(name: str, path: Path, steps: int, options: tuple[tuple[str, object], ...] = ()) -> Steps:
    """The coefficient table of `steps` steps of a scheduler on a path. ValueError where they do not fit or the scheduler is stochastic."""
    scheduler, family = _scheduler(name, path, options)
    inputs, final = _probe(scheduler, name, steps)
    t = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    scale = torch.ones_like(t)
    if family == "vp":
        taus = (t + 1) / scheduler.config.num_train_timesteps * path.tau_max
        if isinstance(path, Table) and (t - t.round()).abs().max() > 1e-6:
            raise ValueError(f"{name} visits times between the {len(path.alphas_cumprod)} entries of the table; use a continuous path")
        a, s = path.alpha(taus), path.sigma(taus)
        from_x, from_x0 = 1 / s, -a / s  # m is eps
    elif family == "flow":
        taus = t / scheduler.config.num_train_timesteps
        from_x, from_x0 = 1 / taus, -1 / taus  # m is eps - x0
    else:
        sigma, data = (4 * t).exp(), scheduler.config.sigma_data  # its timestep is log(sigma) / 4
        taus = (sigma / path.hi) ** (1 / path.rho)  # type: ignore[attr-defined]
        scale = (sigma**2 + data**2).sqrt()  # its input is x / scale; m is the raw net of Karras 2022 eq. 7
        from_x, from_x0 = -data / sigma / scale, scale / (sigma * data)
    rows = [(r[: i + 1] * c).tolist() for i, (r, c) in enumerate(zip(inputs, scale, strict=True))]
    table = Steps(tuple(taus.tolist()), tuple(map(tuple, rows)), tuple(from_x.tolist()), tuple(from_x0.tolist()), tuple(final.tolist()))
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    reached = _walk(table, lambda x, tau, cond: one, 0 * one, None).item()
    if not abs(reached - 1) < 0.05:  # any right solver reaches a point mass whatever its order
        raise ValueError(f"{name} does not follow {type(path).__name__} ({steps} steps reach {reached:.2f} where the data is 1); choose another scheduler")
    return table


def scheduler(name: str, **options: object) -> Sampler:
    """`scheduler("UniPCMultistep")` is a sampler; options go to the scheduler's constructor.

    Fits variance-preserving paths (DDIM, DPMSolverMultistep, UniPCMultistep, DEISMultistep, PNDM, HeunDiscrete, EulerDiscrete, LMSDiscrete,
    …), Linear (FlowMatchEulerDiscrete, FlowMatchHeunDiscrete) and VE (EDMEuler, EDMDPMSolverMultistep). len(taus) - 1 is the number of
    steps; the times are the scheduler's own.
    """
    frozen = tuple(sorted(options.items()))

    def sample(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None) -> Tensor:
        if list(taus) != grid(path, len(taus) - 1):
            raise ValueError(f"{name} has times of its own, so sampler.spacing does nothing: give the scheduler an option instead, such as "
                             "+sampler.fn.timestep_spacing=leading")
        return _walk(compile_scheduler(name, path, len(taus) - 1, frozen), denoise, x / path.start_std(taus[0]), cond)

    return sample


def _walk(table: Steps, denoise: Denoise, x_init: Tensor, cond: Cond | None) -> Tensor:
    terms = [x_init]
    for tau, row, c_x, c_0 in zip(table.taus, table.inputs, table.from_x, table.from_x0, strict=True):
        x = _combine(row, terms)
        terms.append(c_x * x + c_0 * denoise(x, x.new_full((len(x),), tau), cond))
    return _combine(table.final, terms)


def _combine(row: Sequence[float], terms: list[Tensor]) -> Tensor:
    return sum((c * m for c, m in zip(row[1:], terms[1:], strict=True) if c), row[0] * terms[0])
