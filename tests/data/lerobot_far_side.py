"""Run in a venv with Hugging Face's lerobot: opens a dataset with LeRobotDataset, or records one, and prints what it saw as JSON.

torchvision, which lerobot imports for a tensor of a picture and for transforms nobody asks for here, is left out, and so is torchcodec: the frames
that LeRobot asks for, by file and time, are decoded by PyAV.
"""
import json
import sys
import types
from pathlib import Path

import av
import datasets  # noqa: F401  before the stand-ins, for it looks whether torchvision is installed
import numpy as np
import torch


class _Anything(types.ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class ToTensor:
    def __call__(self, picture):
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


for name in ("accelerate", "torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional", "torchvision.io"):
    sys.modules[name] = _Anything(name)
    if "." in name:
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], sys.modules[name])
sys.modules["torchvision.transforms"].ToTensor = ToTensor

import lerobot.datasets.lerobot_dataset as lerobot  # noqa: E402


def decode(path, timestamps, tolerance_s, backend=None):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = [(float(f.pts * stream.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
    out = []
    for t in timestamps:
        near = min(found, key=lambda f: abs(f[0] - t))
        assert abs(near[0] - t) < tolerance_s, (t, near[0])
        out.append(torch.from_numpy(near[1]).permute(2, 0, 1).float() / 255)
    return torch.stack(out)


lerobot.decode_video_frames = decode


def opened(root: str, camera: str) -> dict:
    d = lerobot.LeRobotDataset("local/test", root=root)
    items = [d[i] for i in range(len(d))]
    bits = [[int(x[camera][:, :, 8 * b + 2:8 * b + 6].mean() > 0.47) << b for b in range(10)] for x in items] if camera in items[0] else []
    return {"episodes": d.num_episodes, "frames": d.num_frames, "fps": d.fps, "robot": d.meta.robot_type, "tasks": [x["task"] for x in items],
            "numbers": [sum(b) for b in bits], "action": [x["action"].tolist() for x in items], "state": [x["observation.state"].tolist() for x in items],
            "episode": [int(x["episode_index"]) for x in items], "stats": {k: v.tolist() for k, v in d.meta.stats["action"].items()}}


def record(root: str) -> dict:
    """Two episodes of 12 and 7 frames, camera as images, by LeRobot's own writer."""
    features = {"observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
                "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
                "observation.images.top": {"dtype": "image", "shape": (32, 80, 3), "names": ["height", "width", "channels"]},
                "next.done": {"dtype": "bool", "shape": (1,), "names": None}}
    d = lerobot.LeRobotDataset.create("local/test", fps=20, features=features, root=root, robot_type="arm", use_videos=False)
    rng, said = np.random.default_rng(0), []
    for episode, n in enumerate((12, 7)):
        for i in range(n):
            frame = {"observation.state": rng.normal(size=3).astype("float32"), "action": rng.normal(size=2).astype("float32"),
                     "observation.images.top": rng.integers(0, 256, (32, 80, 3)).astype("uint8"), "next.done": np.array([i == n - 1])}
            said.append({k: v.tolist() for k, v in frame.items()})
            d.add_frame({**frame, "task": ["push", "pull"][episode]})
        d.save_episode()
    d.finalize()
    return {"frames": said}


if __name__ == "__main__":
    Path(sys.argv[-1]).write_text(json.dumps(record(sys.argv[2]) if sys.argv[1] == "record" else opened(sys.argv[2], sys.argv[3])))
