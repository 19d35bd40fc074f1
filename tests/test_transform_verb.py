"""dipole train transform=… as a user types it: arguments from the dataset, kept with the run, the same in eval, resume and distill."""
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from policy.data import Store
from policy.data.relative import RelativeToChunk
from policy.data.transform import Binarise, Chain, Rotation
from policy.train import checkpoint
from tests.shell import SHORT, TINY, facts, refused
from tests.test_distill import FEW

NET = ["net.widths=[8,16]", "net.groups=4", "net.time_dim=16"]


@pytest.fixture(scope="module")
def relative(shell, run):
    done = shell("train", "recipe=gantry", "formalism=flow", "transform=[relative,gripper]", "per_step=true", "data.path=demos.zarr", "run=relative",
                 "train.steps=4", *NET, *FEW)
    assert done.code == 0, done.err
    return done


def test_arguments_come_from_the_dataset_and_stay_with_the_run(shell, relative):
    """conf/data/gantry.yaml says what the actions are about; low and high are those of the data."""
    planner, about = checkpoint.load(shell.folder / "relative")
    fingers = Store.open(shell.folder / "demos.zarr").read("action")[:, 3]
    first, second = planner.transform.parts
    assert first == RelativeToChunk("hand", [0, 1, 2], [0, 1, 2]) and isinstance(second, Binarise) and second.channels == (3,)
    assert fingers.min() - 1e-6 <= second.low < second.threshold < second.high <= fingers.max() + 1e-6
    assert planner.normalizer.shapes["action"] == (16, 4) and about["planner"]["per_step"] is True
    saved = OmegaConf.load(shell.folder / "relative" / "config.yaml")
    assert saved.transform.relative.state == "hand" and saved.transform.gripper.threshold == second.threshold


def test_it_is_rolled_out_resumed_taught_and_judged(shell, relative):
    assert shell("eval", "run=relative", "out=there", *SHORT).code == 0
    done = shell("eval", "likelihood", "run=relative", "out=nats", "likelihood.windows=4", "likelihood.scored=4", "likelihood.steps=4", "likelihood.draws=2",
                 "likelihood.noise=[0.1]")
    assert done.code == 0, done.err
    found = json.loads((shell.folder / "nats" / "likelihood.json").read_text())
    assert found["dims"] == 64 and found["physical"]["add_nats_per_dim"] is None and "actions in m" not in (shell.folder / "nats/report.html").read_text()
    assert shell("train", "run=relative", "resume=true", "train.steps=5").code == 0 and facts(shell, "relative")["step"] == 5
    done = shell("distill", "run=relative", "out=relative-student", "train.steps=2", *FEW)
    assert done.code == 0, done.err
    assert checkpoint.load(shell.folder / "relative-student")[0].transform == checkpoint.load(shell.folder / "relative")[0].transform
    refused(shell("eval", "run=relative", "transform=delta"), "transform cannot change after training")
    refused(shell("eval", "run=relative", "per_step=false"), "per_step cannot change after training")
    refused(shell("train", "run=relative", "resume=true", "transform=delta", "train.steps=9"), "trained with another transform")
    assert "transform" not in facts(shell, "run")["planner"]  # a run without one is as it was


def test_a_dataset_that_says_of_itself_what_its_poses_are(shell):
    """The attribute action, as converted datasets have it: poses in axis-angle, a gripper, and where the hand is in a wider state."""
    rng, action = np.random.default_rng(0), {"kind": "absolute", "space": "ee", "of": "state", "of_take": [2, 3, 4, 5, 6, 7], "rotation": "axis_angle",
                                             "parts": {"position": [0, 1, 2], "rotation": [3, 4, 5], "gripper": [6]}}
    store = Store.create(shell.folder / "poses.zarr", {"state": ((8,), "float32"), "action": ((7,), "float32")}, fps=10, attrs={"action": action})
    for _ in range(4):
        x = 0.1 * rng.standard_normal((30, 8)).cumsum(0)
        store.append({"state": x, "action": np.concatenate([x[:, 2:] + 0.01, rng.random((30, 1)) < 0.5], 1).astype(np.float32)})
    words = ["train", "recipe=own", "data.path=poses.zarr", *TINY]
    done = shell(*words, "transform=[pose_6d,gripper]", "run=umi", "train.steps=2")
    assert done.code == 0, done.err
    made = checkpoint.load(shell.folder / "umi")[0].transform
    where = {"rotation": "axis_angle", "turns": [3, 4, 5], "turns_take": [5, 6, 7], "state_rotation": "axis_angle"}
    assert made == Chain((RelativeToChunk("state", [0, 1, 2], [2, 3, 4], **where, frame="tool", position=[0, 1, 2]),
                          Rotation("axis_angle", "rotation_6d", [3, 4, 5]), Binarise([9], 0.5, 0.0, 1.0)))
    refused(shell(*words, "transform=absolute", "run=x"), "those of poses.zarr are absolute here; leave transform=absolute out")
    done = shell(*words, "transform=[absolute,relative]", "data.semantics={kind: delta}", "transform.absolute.scale=0.05", "run=summed", "train.steps=1")
    assert done.code == 0 and [type(t).__name__ for t in checkpoint.load(shell.folder / "summed")[0].transform.parts] == ["DeltaToAbsolute", "RelativeToChunk"]
    refused(shell(*words, "transform=sideways", "run=x"), "there is no transform=sideways", "relative")
    refused(shell(*words, "transform=delta", "transform.delta.frame=up", "run=x"), "frame='up' is unknown; use one of mixed, tool, base")


def test_a_dataset_that_says_nothing_is_asked_for_the_line_to_add(shell, run):
    store = Store.create(shell.folder / "silent.zarr", {"q": ((2,), "float32"), "action": ((2,), "float32")}, fps=10)
    store.extend([{"q": np.random.rand(20, 2), "action": np.random.rand(20, 2)}] * 2)
    words = ["train", "recipe=own", "data.path=silent.zarr", "run=silent", *TINY, "train.steps=1"]
    refused(shell(*words, "transform=delta"), "silent.zarr does not say which observation", "transform.delta.state=OBSERVATION", "data.semantics=")
    assert shell(*words, "transform=delta", "data.semantics={kind: absolute, of: q}").code == 0
    assert shell(*[w.replace("run=silent", "run=silent2") for w in words], "transform=delta", "transform.delta.state=q").code == 0
