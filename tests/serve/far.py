"""Far sides of the tests: planner servers in processes of their own, and what they serve."""
import ast
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from policy.serve.card import Card

ROOT = Path(__file__).parents[2]
CARD = Card("toy0", "toy", {"x": (3,)}, t_obs=2, horizon=8, action_dim=2, dt=0.02, committed=4, merges=("naive", "ensemble", "frozen"), joints=("a", "b"),
            joint_units=("m", "rad"))


class Toy:
    """Plans in closed form, after `plan_ms`: actions[i] = newest x[:2] + i, plus the noise where there is any; the committed prefix as it is.

    x[2] of the newest observation asks for misbehaviour: 1 raises, 2 plans NaN, 3 plans the wrong shape.
    """

    def __init__(self, plan_ms: float = 0.0, card: Card = CARD):
        self.plan_ms, self.card = plan_ms, card

    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        time.sleep(self.plan_ms / 1e3)
        x = np.asarray(obs["x"], np.float64)[-1]
        actions = x[:2] + np.arange(self.card.horizon)[:, None] + (0 if noise is None else noise)
        if prefix is not None:
            actions[:committed] = prefix[:committed]
        if x[2] == 1:
            raise RuntimeError("/secret/path is not for clients")
        return actions * np.nan if x[2] == 2 else actions[:, :1] if x[2] == 3 else actions


def obs(a: float = 0.0, b: float = 0.0, how: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.array([[0, 0, 0], [a, b, how]], np.float32)}


class Far:
    """A process that printed `ready URL …`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60.0):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})})
        assert self.process.stdout is not None
        self.said: list[str] = []
        end = time.monotonic() + timeout
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("ready ") or time.monotonic() > end:
                break
        if not self.said or not self.said[-1].startswith("ready "):
            self.process.kill()
            raise RuntimeError(f"{command} did not get ready: {''.join(self.said)}")
        self.url = self.said[-1].split()[1]
        self.port = int(self.url.rpartition(":")[2])

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def rss_mb(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def end(self) -> int:
        """SIGTERM, wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def toy_server(*, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[Far]:
    """PlannerServer(Toy(plan_ms), Entrance(…), **options) in a process; `service`, `limits` are dicts, `card` changes the toy's; planner=PATH: planner_of."""
    far = Far([sys.executable, "-m", "tests.serve.far", repr(options)], env)
    try:
        yield far
    finally:
        if far.process.poll() is None:
            far.process.kill()
        far.process.wait(10)
        assert far.process.stdout is not None
        far.process.stdout.close()


def planner_of(path: str) -> Any:
    """A planner of the dataset at `path` (made when it is not there) that draws nothing: the same weights and plans in every process."""
    import torch

    from policy.data.store import Store
    from policy.diffusion.samplers import first_order
    from tests.helpers import make_data, make_planner, make_store
    torch.set_num_threads(1)
    store = Store.open(Path(path)) if Path(path).exists() else make_store(Path(path))
    planner = make_planner(make_data(store)).eval()
    planner.set_sampler(first_order, 5, temperature=0.0)
    return planner


def certificate(folder: Path) -> tuple[str, str]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=planner",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], check=True, capture_output=True)
    return str(cert), str(key)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def main(text: str) -> None:
    from policy.serve.entrance import Entrance
    from policy.serve.packing import Limits
    from policy.serve.server import PlannerServer, Service
    options = ast.literal_eval(text)
    backend: Any = Toy(options.pop("plan_ms", 0.0), replace(CARD, **options.pop("card", {})))
    if path := options.pop("planner", None):
        from policy.serve.backend import PlannerBackend
        backend = PlannerBackend(planner_of(path))
    service, limits = Service(**options.pop("service", {})), Limits(**options.pop("limits", {}))
    entrance = Entrance(**{k: options.pop(k) for k in ("host", "port", "token", "tls", "insecure") if k in options})
    PlannerServer(backend, entrance, service=service, limits=limits, **options).run(lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
