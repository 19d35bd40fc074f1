"""Many copies of one MuJoCo model in mujoco_warp: what envs.simulator is to threads, on a GPU or warp's CPU device, in float32."""

import copy
from typing import NamedTuple

import mujoco
import numpy as np
import torch

from envs.simulator import State
from envs.task import Task

try:
    import mujoco_warp
    import warp
except ImportError as error:
    raise ImportError("simulator=warp needs mujoco_warp and warp, in the versions that fit: pip install dipole[warp]") from error

STATE = ("qpos", "qvel", "mocap_pos")
CARRIED = (*STATE, "act", "qacc_warmstart", "time")  # all that a physics step leaves to the next one


class Room(NamedTuple):
    """What a world has memory for: contacts, as an average over the worlds, and rows of constraints."""

    contacts: int
    constraints: int


class Worlds:
    """n worlds of one model on one device. qpos, qvel, mocap_pos, ctrl are tensors (n, ...) in warp's own memory.

    mujoco_warp drops the contacts that it has no room for. Here a count of what was needed is kept, the room grows, and the control
    steps are done again (it prints a line for each of the steps that are repeated).
    """

    def __init__(self, model: mujoco.MjModel, n: int, *, substeps: int, device: str | None, room: Room) -> None:
        warp.config.quiet = True
        warp.init()
        device = device or ("cuda" if torch.cuda.is_available() and warp.is_cuda_available() else "cpu")
        self.mj_model, self.n, self.substeps, self._device = copy.copy(model), n, substeps, warp.get_device(device)
        # The name is MuJoCo's, whose own box against box it leaves alone. Here it chooses the same separating axes for them, in place
        # of a general search that finds one of four contacts where boxes lie flat: gantry's step errors, 2 mm at most, become 0.1 mm.
        self.mj_model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_NATIVECCD
        self.device = torch.device(warp.device_to_torch(self._device))
        with warp.ScopedDevice(self._device):
            self._model = mujoco_warp.put_model(self.mj_model)
        self._make(room)

    def _make(self, room: Room) -> None:
        self.room = room
        with warp.ScopedDevice(self._device):
            data = mujoco_warp.put_data(self.mj_model, mujoco.MjData(self.mj_model), nworld=self.n, nconmax=room.contacts, njmax=room.constraints)
            needed = warp.zeros(2, dtype=int)
            self._data, self._needed_array, self._needed = data, needed, warp.to_torch(needed)
            self.carried = {name: warp.to_torch(array) for name in CARRIED if (array := getattr(data, name)).size}
            self.carried.setdefault("mocap_pos", torch.empty(self.n, 0, 3, device=self.device))
            self.qpos, self.qvel, self.mocap_pos, self.ctrl = *(self.carried[name] for name in STATE), warp.to_torch(data.ctrl)
            self._graph = None
            if self._device.is_cuda:
                self._steps()  # loads every kernel, which a capture cannot
                with warp.ScopedCapture() as capture:
                    self._steps()
                self._graph = capture.graph
                warp.synchronize_device()

    def _steps(self) -> None:
        data = self._data
        for _ in range(self.substeps):
            mujoco_warp.step(self._model, data)
            warp.launch(_count, dim=self.n, inputs=[data.nefc, data.nacon, data.ncollision], outputs=[self._needed_array])

    def write(self, worlds: torch.Tensor, state: State) -> None:
        """Put worlds (m,), indices, into state (m, ...) at time 0, with everything else as freshly made."""
        for name, value in self.carried.items():
            value[worlds] = getattr(state, name) if name in STATE else 0.0

    def run(self, ctrl: torch.Tensor) -> State:
        """Run all worlds under ctrl (n, t, nu), one row per control step; the state (n, t, ...) after each of them."""
        before = {name: value.clone() for name, value in self.carried.items()}
        while True:
            path = self._run(ctrl)
            constraints, contacts = self._needed.tolist()
            if constraints <= self.room.constraints and contacts <= self.room.contacts * self.n:
                self._before = before
                return path
            # Half as much again: the count stops at what the dropped contacts would have led to.
            self._make(Room(max(self.room.contacts, -(-3 * contacts // (2 * self.n))), max(self.room.constraints, 3 * constraints // 2)))
            for name, value in before.items():
                self.carried[name].copy_(value)

    def _run(self, ctrl: torch.Tensor) -> State:
        self._needed.zero_()
        seen = []
        for k in range(ctrl.shape[1]):
            self.ctrl.copy_(ctrl[:, k])
            if self._graph is None:
                with warp.ScopedDevice(self._device):
                    self._steps()
            else:
                warp.capture_launch(self._graph, stream=warp.stream_from_torch(self.device))
            seen.append((self.qpos.clone(), self.qvel.clone()))
        qpos, qvel = (torch.stack(each, dim=1) for each in zip(*seen, strict=True))
        return State(qpos, qvel, self.mocap_pos[:, None].expand(-1, ctrl.shape[1], -1, -1))

    def keep(self, worlds: torch.Tensor) -> None:
        """Let worlds (n,) bool stay where the last run left them, and put the others back to where it began."""
        for name, value in self.carried.items():
            value.copy_(torch.where(spread(worlds, value), value, self._before[name]))


@warp.kernel
def _count(nefc: warp.array[int], nacon: warp.array[int], ncollision: warp.array[int], needed: warp.array[int]):
    world = warp.tid()
    warp.atomic_max(needed, 0, nefc[world])  # type: ignore[call-overload]
    if world == 0:
        warp.atomic_max(needed, 1, warp.max(nacon[0], ncollision[0]))  # type: ignore[call-overload]


def guess_room(task: Task, episodes: int = 8, steps: int = 60) -> Room:
    """Twice the most that a few episodes of random play, straight from target to target, need in C MuJoCo."""
    model, rng, space = task.model, np.random.default_rng(0), task.action_space
    data, contacts, constraints = mujoco.MjData(model), 4, 8
    for seed in range(episodes):
        state, targets = task.reset(seed), rng.uniform(space.low, space.high, (steps // 20 + 1, *task.action_shape))
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:], data.mocap_pos[:] = state.qpos, state.qvel, state.mocap_pos
        for k in range(steps):
            i, s = k // 20, k % 20 / 20
            data.ctrl[:] = task.control((1 - s) * targets[i] + s * targets[i + 1])
            for _ in range(task.substeps):
                mujoco.mj_step(model, data)
                contacts, constraints = max(contacts, data.ncon), max(constraints, data.nefc)
    return Room(2 * contacts, 2 * constraints)


def spread(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """mask (n,) with the axes that a value (n, ...) has besides."""
    return mask.reshape(-1, *[1] * (value.ndim - 1))
