"""The Panda's looks: its picture, and Menagerie's meshes, which change nothing else."""

import sys

import mujoco
import numpy as np
import pytest

from envs import render
from envs.batch import BatchEnv
from envs.panda import PandaPick
from envs.simulator import State


def menagerie(folder):
    """A folder like MuJoCo Menagerie's with tetrahedra for meshes, of which one collides there."""
    (folder / "franka_emika_panda" / "assets").mkdir(parents=True)
    corners = "".join(f"v {x} {y} {z}\n" for x, y, z in ((0, 0, 0), (0.2, 0, 0), (0, 0.2, 0), (0, 0, 0.2)))
    (folder / "franka_emika_panda" / "assets" / "link1.obj").write_text(corners + "f 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    (folder / "franka_emika_panda" / "panda.xml").write_text("""
<mujoco>
  <compiler meshdir="assets"/>
  <default>
    <default class="visual"><geom type="mesh" contype="0" conaffinity="0" group="2"/></default>
    <default class="collision"><geom type="mesh" group="3"/></default>
  </default>
  <asset><material name="green" rgba="0 1 0 1"/><mesh file="link1.obj"/><mesh name="hull" file="link1.obj" scale="2 2 2"/></asset>
  <worldbody>
    <body name="link0"><geom mesh="link1" class="visual" rgba="0 0 1 1"/>
      <body name="link1" pos="0 0 .333"><joint axis="0 0 1"/>
        <geom mesh="link1" material="green" class="visual" pos="0 0 .1"/><geom mesh="hull" class="collision"/>
        <body name="link8"><geom mesh="link1" class="visual"/></body>
      </body>
    </body>
  </worldbody>
</mujoco>""")


def test_meshes_change_the_looks_and_nothing_else(tmp_path, monkeypatch):
    pytest.importorskip("mujoco_menagerie", reason="its loader is part of what is tested: pip install mujoco-menagerie")
    menagerie(tmp_path)
    monkeypatch.setenv("MENAGERIE_ROOT", str(tmp_path))
    plain, dressed = PandaPick(), PandaPick(meshes=True)
    added = [dressed.model.geom(i) for i in range(dressed.model.ngeom) if dressed.model.geom_type[i] == mujoco.mjtGeom.mjGEOM_MESH]
    assert [dressed.model.body(geom.bodyid[0]).name for geom in added] == ["link0", "link1"]
    assert all(not geom.contype[0] and not geom.conaffinity[0] for geom in added)
    shown = [dressed.model.body(int(body)).name for body in dressed.model.geom_bodyid[dressed.model.geom_group == 2]]
    assert shown == ["link0", "link1"], "no capsule shows through"
    paths = []
    for task in (plain, dressed):
        env, expert = BatchEnv(task, 4, threads=1), task.expert(4, 1)
        obs, _ = env.reset(seed=0)
        for _ in range(50):
            obs, *_, info = env.step(expert.act(obs))
            paths.append(info["qpos"])
        env.close()
    assert (np.array(paths[:50]) == np.array(paths[50:])).all() and info["success"].any()


@pytest.mark.gl
def test_meshes_are_drawn_where_the_links_are(gl, tmp_path, monkeypatch):
    pytest.importorskip("mujoco_menagerie", reason="its loader is part of what is tested: pip install mujoco-menagerie")
    menagerie(tmp_path)
    monkeypatch.setenv("MENAGERIE_ROOT", str(tmp_path))
    state = PandaPick().reset(0)
    tasks = PandaPick(), PandaPick(meshes=True)
    plain, dressed = (render.frames(task.model, state.qpos[None], state.mocap_pos[None], camera="front", size=64)[0].astype(int) for task in tasks)
    render.release()
    green = dressed[..., 1] - dressed[..., [0, 2]].max(-1)
    assert (green > 60).sum() > 10, "the link's mesh in its material"
    assert (np.abs(plain - dressed).max(-1) > 20).sum() > 150, "the white arm is gone"


def test_meshes_that_cannot_be_had_say_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("mujoco_menagerie", reason="its errors are part of what is tested: pip install mujoco-menagerie")
    monkeypatch.delenv("MENAGERIE_ROOT", raising=False)
    monkeypatch.setenv("MENAGERIE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MENAGERIE_BASE_URL", "file:///nowhere")
    with pytest.raises(OSError, match=r"downloads once \(file:///nowhere.*prefetch franka_emika_panda.*meshes=false"):
        _ = PandaPick(meshes=True).model
    monkeypatch.setitem(sys.modules, "mujoco_menagerie", None)
    with pytest.raises(ImportError, match=r"pip install 'dipole\[menagerie\]'"):
        _ = PandaPick(meshes=True).model


@pytest.mark.gl
def test_the_picture_shows_cube_and_disc(gl):
    """Red where the cube is and green where the disc is: their middles move to the right when they move along +y."""
    task = PandaPick()
    state = State.stack([task.reset(0)] * 2)
    state.qpos[:, :7] = [0, -0.6, 0, -2.4, 0, 1.9, 0.785]
    state.qpos[:, 9:11], state.mocap_pos[:, 0, :2] = [[0.5, -0.1], [0.5, 0.1]], [[0.6, -0.15], [0.6, 0.05]]
    images = render.frames(task.model, state.qpos, state.mocap_pos, camera=task.camera, size=128).astype(int)
    render.release()
    for channel, others in ((0, [1, 2]), (1, [0, 2])):
        seen = images[..., channel] - images[..., others].max(-1) > 50
        across = [np.argwhere(each)[:, 1].mean() for each in seen]
        assert (seen.sum((1, 2)) > 8).all() and across[1] > across[0] + 8
