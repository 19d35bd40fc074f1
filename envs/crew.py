"""Who does work that comes in independent pieces: this process, spawned ones, or a Ray cluster. The results are the same, in the order of the pieces."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from typing import Any

Work = Callable[[Any, Any], Any]  # (what `made` makes, piece) -> result


class Crew:
    """This process. ahead: pieces that are under way at once; threads: how many a worker may use, None for all."""

    ahead = 1
    threads: int | None = None
    made: Any = None

    def start(self, maker: Callable[[], Any]) -> None:
        """maker makes what a worker works with; it can be pickled."""
        self.made = maker()

    def submit(self, work: Work, piece: Any) -> Callable[[], Any]:
        """Hand a piece over: what waits for its result, and raises what the work raised."""
        return lambda: work(self.made, piece)

    def close(self) -> None:
        if hasattr(self.made, "close"):
            self.made.close()


def do(crew: Crew, work: Work, maker: Callable[[], Any], pieces: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(piece, work(maker(), piece)) in order, without an end where pieces have none; each worker calls maker once. It closes the crew."""
    waiting: deque[tuple[Any, Callable[[], Any]]] = deque()
    try:
        crew.start(maker)
        for piece in pieces:
            waiting.append((piece, crew.submit(work, piece)))
            if len(waiting) >= crew.ahead:
                done, result = waiting.popleft()
                yield done, result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result()
    finally:
        crew.close()


def crew_of(workers: int | None = None, ray: str | None = None) -> Crew:
    """workers: spawned processes, one per CPU when absent, none for 0.   ray: address of a Ray cluster, "auto" for the one this machine is part of,
    "local" for one made here; workers then limits the pieces under way at once, as many as its CPUs when absent.
    """
    if ray is not None:
        return Cluster(ray, workers)
    return Processes(os.cpu_count() or 1 if workers is None else workers) if workers != 0 else Crew()


class Processes(Crew):
    threads = 1

    def __init__(self, workers: int) -> None:
        self.ahead = 2 * workers
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    def start(self, maker: Callable[[], Any]) -> None:
        self.made = pickle.dumps(maker)

    def submit(self, work: Work, piece: Any) -> Callable[[], Any]:
        return self.pool.submit(_work, work, self.made, piece).result

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class Cluster(Crew):
    """Ray tasks, one CPU each; a piece whose machine is lost is done again elsewhere. The machines need this package at the same version."""

    threads = 1

    def __init__(self, address: str, most: int | None) -> None:
        try:
            import ray
        except ImportError as e:
            raise ImportError("ray=… collects on a Ray cluster: pip install 'dipole[ray]'") from e
        if most == 0:
            raise ValueError("workers=0 does the work in this process; leave it out with ray=…, or say how many pieces may be under way at once")
        self.ray, self.mine = ray, not ray.is_initialized()
        try:
            if self.mine:
                ray.init(None if address == "local" else address, log_to_driver=False, include_dashboard=False if address == "local" else None)
        except (ConnectionError, ValueError) as e:
            raise ValueError(f"there is no Ray cluster at ray={address} ({e}). Start one with `ray start --head`, or use ray=local") from e
        self.ahead = most or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.remote = ray.remote(_work)

    def start(self, maker: Callable[[], Any]) -> None:
        self.made = self.ray.put(pickle.dumps(maker))

    def submit(self, work: Work, piece: Any) -> Callable[[], Any]:
        waits = self.remote.remote(work, self.made, piece)
        return lambda: self._result(waits)

    def _result(self, waits: Any) -> Any:
        try:
            return self.ray.get(waits)
        except self.ray.exceptions.RayTaskError as e:
            raise e.as_instanceof_cause() from None

    def close(self) -> None:
        if self.mine:
            self.ray.shutdown()


def _work(work: Work, made: bytes, piece: Any) -> Any:
    return work(_worker(made), piece)


@lru_cache(maxsize=1)
def _worker(made: bytes) -> Any:
    """What this worker works with; the bytes come from the process that started it."""
    return pickle.loads(made)()
