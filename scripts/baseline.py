"""Roll a planner that learns nothing out on distinct seeds, as a baseline: dipole baseline episodes=200."""
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from policy.diffusion.samplers import Draw
from policy.train import checkpoint
from policy.types import Obs, Spec
from scripts import common
from scripts.verb import verb

if TYPE_CHECKING:
    from envs.pusht_mpc import PushPlanner


class Simulating:
    """A planner from full states in the place of a learned one, so that it is rolled out, delayed and timed by the same code."""

    def __init__(self, search: "PushPlanner"):
        task, self.search = search.task, search
        shapes = {k: v.shape or () for k, v in task.observation_space.spaces.items()}
        if set(shapes) != {"state", "velocity"}:
            raise ValueError(f"simulating needs the full state, not {', '.join(shapes)}: planner.task.obs=full")
        self.spec = Spec(shapes, task.action_shape[0], t_obs=1, horizon=search.horizon, fps=task.fps, task=task.name, units=task.units,
                         action_semantics=task.action_semantics)

    def eval(self) -> "Simulating":
        return self

    def parameters(self) -> Iterator[torch.Tensor]:
        yield torch.zeros(0)  # on the CPU

    def plan(self, obs: Obs, *, noise: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """obs {key: (b, 1, *shape)} -> actions (b, horizon, 2); the noise (b, horizon, 2) of a row seeds what the row draws."""
        state, velocity = (obs[key][:, -1].double().numpy() for key in ("state", "velocity"))
        rngs = [np.random.default_rng(row.numpy().view(np.uint32).ravel()) for row in noise.float()]
        return torch.from_numpy(self.search.plan(self.search.task.state(state, velocity=velocity), rngs))


@verb("baseline")
def main(cfg: DictConfig) -> dict[str, Any]:
    checkpoint.check_targets(common.plain(cfg.planner), ("envs", *cfg.trust))
    search = instantiate(cfg.planner)
    out = Path(cfg.out or Path("outputs/baseline") / str(HydraConfig.get().runtime.choices.get("env")))
    try:
        metrics = common.rollout(Simulating(search), cfg, out, episodes=cfg.episodes, seed=cfg.seed, copies=cfg.copies, videos=cfg.videos)  # type: ignore[arg-type]
    finally:
        search.close()
    common.write_start(out, cfg)
    common.finish(out, common.result_line(metrics))
    return {"folder": str(out), **metrics}


if __name__ == "__main__":
    main()
