"""Serve a trained planner to robots over a websocket: dipole serve run=outputs/gantry port=8765."""
import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policy.serve import artifact, entrance
from policy.serve.card import Backend, Delayed
from policy.serve.packing import Limits
from policy.serve.server import PlannerServer, Service
from policy.train.log import console
from scripts import serving, settings
from scripts.cli import ends_at_once, words_to_overrides
from scripts.verb import verb

FIXED = ("sampler", "guide", "control", "precision", "fast", "device", "checkpoint", "robot")  # of an export


def backend_of(cfg: DictConfig) -> Backend:
    if cfg.artifact:
        if fixed := [o for o in settings.overrides() if settings.key_of(o) in FIXED]:
            raise ValueError(f"{fixed[0]} cannot be changed in an export: export the run with it, or serve the run")
        return artifact.load(Path(cfg.artifact), threads=cfg.threads, trust=list(cfg.trust))
    from scripts.policies import trained  # the extra serve; what an export needs is lighter
    return trained(cfg)


def check(cfg: DictConfig) -> None:
    """ValueError when cfg is no server's."""
    if cfg.do:
        raise ValueError(f"dipole serve {cfg.do} is unknown; settings are written key=value")
    if bool(cfg.run) == bool(cfg.artifact):
        raise ValueError("what is to be served? Name the folder of a run, dipole serve run=FOLDER, or of an export, dipole serve artifact=FOLDER")
    settings.whole(1, threads=cfg.threads, **{"limits.connections": cfg.limits.connections})
    settings.whole(1024, **{"limits.bytes": cfg.limits.bytes})  # with less no observation of any model fits
    settings.number(0, delay=cfg.delay)
    settings.truth(**{k: cfg[k] for k in ("insecure", "openpi", "fast")})
    if bool(cfg.tls.cert) != bool(cfg.tls.key):
        raise ValueError("tls.cert and tls.key belong together: give both, or none")
    if not isinstance(cfg.host, str):
        raise ValueError(f"host={cfg.host} must be a name or an address, such as 127.0.0.1")


@verb("serve", of_run=("sampler", "guide", "control"))
def main(cfg: DictConfig) -> dict[str, Any]:
    check(cfg)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dipole").setLevel(logging.INFO)  # of others only warnings
    entry = entrance.Entrance(cfg.host, cfg.port, serving.token(cfg.token_file), (cfg.tls.cert, cfg.tls.key) if cfg.tls.cert else None, cfg.insecure)
    entry.check_free()  # loading takes seconds
    with ends_at_once():
        backend = backend_of(cfg)
    if cfg.delay:
        backend = Delayed(backend, cfg.delay)
    server = PlannerServer(backend, entry, openpi=cfg.openpi, limits=Limits(bytes=cfg.limits.bytes), service=Service(connections=cfg.limits.connections))
    server.run(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
    return {}


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()
