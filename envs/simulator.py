"""Many copies of one MuJoCo model, stepped by threads: one MjModel, n MjData, no processes, no Python between substeps."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from envs.arrays import Array

QPOS, QVEL, QACC, CTRL = (int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}")) for name in ("QPOS", "QVEL", "QACC", "CTRL"))
BAD = {QPOS: "qpos", QVEL: "qvel", QACC: "qacc", CTRL: "ctrl"}


@dataclass(frozen=True)
class State:
    """MuJoCo states with any leading axes: numpy float64, on mujoco_warp torch float32.

    qpos: (..., nq)   qvel: (..., nv)   mocap_pos: (..., nmocap, 3) m, bodies that only a reset moves: goals, obstacles.
    """

    qpos: Array
    qvel: Array
    mocap_pos: Array

    def __getitem__(self, index: Any) -> State:
        return State(self.qpos[index], self.qvel[index], self.mocap_pos[index])

    @staticmethod
    def stack(rows: list[State]) -> State:
        return State(*(np.stack([getattr(row, name) for row in rows]) for name in ("qpos", "qvel", "mocap_pos")))


class Simulator:
    """n independent worlds of one model. A world keeps MuJoCo's solver warm start, so equal histories give bit-equal states.

    A world that MuJoCo finds unstable, or stops at with an error, is NaN from that control step on until it is written again.
    """

    def __init__(self, model: mujoco.MjModel, n: int, *, substeps: int, threads: int | None = None) -> None:
        self.model, self.substeps = model, substeps
        self.threads = max(1, min(n, threads or os.cpu_count() or 1))
        self._worlds = [mujoco.MjData(model) for _ in range(n)]
        self._errors: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def write(self, worlds: np.ndarray, state: State) -> None:
        """Put worlds (m,) into state (m, ...) at time 0, with everything else as freshly made."""
        for row, world in enumerate(worlds):
            data = self._worlds[world]
            mujoco.mj_resetData(self.model, data)
            self._errors.pop(int(world), None)
            data.qpos[:], data.qvel[:], data.mocap_pos[:] = state.qpos[row], state.qvel[row], state.mocap_pos[row]
            mujoco.mj_forward(self.model, data)

    def run(self, worlds: np.ndarray, ctrl: np.ndarray) -> State:
        """Run worlds (m,) under ctrl (m, t, nu), one row per control step; the state (m, t, ...) after each of them."""
        m, t, _ = ctrl.shape
        qpos, qvel = np.empty((m, t, self.model.nq)), np.empty((m, t, self.model.nv))

        def work(rows: np.ndarray) -> None:
            for row in rows:
                self._drive(worlds[row], ctrl[row], qpos[row], qvel[row])

        if self._pool is None:
            work(np.arange(m))
        else:
            list(self._pool.map(work, np.array_split(np.arange(m), self.threads)))
        mocap = np.stack([self._worlds[world].mocap_pos for world in worlds])
        return State(qpos, qvel, np.repeat(mocap[:, None], t, axis=1))

    def _drive(self, world: int, ctrl: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        data = self._worlds[world]
        warned = data.warning.number  # a view, zero since the last write
        for k in range(len(ctrl)):
            data.ctrl[:] = ctrl[k]
            try:
                mujoco.mj_step(self.model, data, self.substeps)  # releases the GIL
            except mujoco.FatalError as error:
                self._errors[world], warned[QACC] = str(error), 1
            if warned[QPOS] or warned[QVEL] or warned[QACC] or warned[CTRL]:  # and MuJoCo has quietly begun anew, or dropped the controls
                qpos[k:] = qvel[k:] = np.nan
                return
            qpos[k], qvel[k] = data.qpos, data.qvel

    def why(self, world: int) -> str:
        """What made a world NaN."""
        if world in self._errors:
            return f"MuJoCo stopped: {self._errors[world]}"
        warnings = self._worlds[world].warning
        name, at = next((name, warnings[i].lastinfo) for i, name in BAD.items() if warnings[i].number)
        return f"the simulation is unstable: MuJoCo found a NaN, infinite or huge value in {name}[{at}]"

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
