"""robomimic, D4RL and Minari files, written as their own projects write them, into the store and back: the same content, bit for bit."""
import io
import json

import gymnasium as gym
import h5py
import numpy as np
import pytest
from h5_same import assert_same_hdf5

from policy.data import DataError, Store
from policy.data.convert import convert, detect, open_source
from policy.data.convert.keep import read_keep

RNG = np.random.default_rng(7)
ENV = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "controller_configs": {"type": "OSC_POSE", "control_delta": True}}}


@pytest.fixture
def robomimic(tmp_path):
    """A file as robomimic.scripts.dataset_states_to_obs writes it: gzipped images, masks of fixed-width names, an XML for each episode."""
    path = tmp_path / "lift.hdf5"
    with h5py.File(path, "w") as f:
        data = f.create_group("data")
        for i, n in enumerate((5, 11, 3, 7, 4, 6, 8, 5, 4, 9, 3)):
            demo = data.create_group(f"demo_{i}")
            demo.create_dataset("actions", data=RNG.uniform(-1, 1, (n, 7)))
            demo.create_dataset("states", data=RNG.normal(size=(n, 32)))
            demo.create_dataset("rewards", data=np.zeros(n))
            demo.create_dataset("dones", data=np.arange(n, dtype=np.int64) == n - 1)
            for group in ("obs", "next_obs"):
                demo.create_dataset(f"{group}/robot0_eef_pos", data=RNG.normal(size=(n, 3)))
                demo.create_dataset(f"{group}/object", data=RNG.normal(size=(n, 10)).astype(">f4"))
                demo.create_dataset(f"{group}/agentview_image", data=RNG.integers(0, 256, (n, 12, 12, 3), np.uint8), compression="gzip", compression_opts=4)
            demo.attrs["num_samples"] = n
            demo.attrs["model_file"] = f"<mujoco model='{i}'>" + "ü" * 500
        f.create_dataset("mask/train", data=np.array([f"demo_{i}" for i in range(9)], "S"))
        f.create_dataset("mask/valid", data=["demo_9", "demo_10"], dtype=h5py.string_dtype("ascii"))
        data.attrs["total"] = 65
        data.attrs["env_args"] = json.dumps(ENV)
    return path


def test_robomimic_comes_back_and_its_observations_are_those_below_obs(robomimic, tmp_path):
    done = convert(robomimic, tmp_path / "a.zarr")
    store = Store.open(done.path)
    assert (done.format, done.episodes, done.steps, done.notes, store.fps) == ("robomimic", 11, 65, (), 20)
    assert store.attrs["obs"] == {"object": "object", "robot0_eef_pos": "robot0_eef_pos"}
    assert done.keys["obs/robot0_eef_pos"] == "robot0_eef_pos" and done.keys["next_obs/robot0_eef_pos"] == "next_obs_robot0_eef_pos"
    assert (store.attrs["action"]["kind"], store.attrs["action"]["rotation"], store.attrs["task"]) == ("delta", "axis_angle", "Lift")
    with h5py.File(robomimic) as f:  # demo_10 comes after demo_9, not after demo_1
        np.testing.assert_array_equal(store.episode(10)["action"], f["data/demo_10/actions"])
    assert_same_hdf5(robomimic, convert(done.path, tmp_path / "b.hdf5").path)


def test_a_mask_chooses_episodes_and_what_is_left_is_written_back(robomimic, tmp_path):
    done = convert(robomimic, tmp_path / "a.zarr", options={"mask": "valid"}, skip=["next_obs/*"])
    assert done.episodes == 2 and "next_obs/object" in done.notes[0] and not any(k.startswith("next") for k in Store.open(done.path).keys)
    with h5py.File(convert(done.path, tmp_path / "b.hdf5").path) as f, h5py.File(robomimic) as whole:
        assert sorted(f["data"]) == ["demo_10", "demo_9"] and f["data"].attrs["total"] == 12 and f["data/demo_9"].attrs["num_samples"] == 9
        assert f["mask/valid"].asstr()[()].tolist() == ["demo_9", "demo_10"] and f["mask/train"].shape == (0,)
        np.testing.assert_array_equal(f["data/demo_9/obs/object"], whole["data/demo_9/obs/object"])
        assert f["data/demo_9"].attrs["model_file"] == whole["data/demo_9"].attrs["model_file"]
    with pytest.raises(ValueError, match=r"no mask 'trian' \(known: train, valid\)"):
        convert(robomimic, tmp_path / "c.zarr", options={"mask": "trian"})
    with pytest.raises(ValueError, match="no option 'filter'; it has mask"):
        open_source(robomimic, filter="train")


def test_an_episode_without_steps_is_left_out_with_a_word(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        for i, n in enumerate((2, 0, 3)):
            f[f"data/demo_{i}/actions"], f[f"data/demo_{i}/states"] = np.zeros((n, 2)), np.zeros((n, 3))
    done = convert(tmp_path / "a.hdf5", tmp_path / "a.zarr", fps=10)
    assert (done.episodes, done.notes) == (2, ("episode 1 has no steps and was left out",))
    with h5py.File(convert(done.path, tmp_path / "b.hdf5").path) as f:
        assert sorted(f["data"]) == ["demo_0", "demo_2"]


def test_a_store_from_elsewhere_becomes_a_robomimic_file(dataset, tmp_path):
    with h5py.File(convert(dataset, tmp_path / "a.hdf5", format="robomimic").path) as f:
        assert sorted(f["data"]) == [f"demo_{i}" for i in range(4)] and f["data"].attrs["total"] == 50
        assert set(f["data/demo_2"]) == {"actions", "obs"} and set(f["data/demo_2/obs"]) == {"pose", "image", "reward"}
        assert f["data/demo_2"].attrs["num_samples"] == 30 and json.loads(f["data"].attrs["env_args"])["env_kwargs"] == {"control_freq": 10.0}
    done = convert(tmp_path / "a.hdf5", tmp_path / "b.zarr")
    for i in range(4):
        for key, x in Store.open(dataset).episode(i).items():
            np.testing.assert_array_equal(x, Store.open(done.path).episode(i)[key])


def damaged(path, change):
    with h5py.File(path, "a") as f:
        change(f)
    return path


@pytest.mark.parametrize("change, message", [
    (lambda f: f["data/demo_3"].move("obs/object", "obs/thing"), r"'obs/object' is missing in data/demo_3 and \(10,\) >f4 a step in data/demo_0.*repair"),
    (lambda f: f["data"].create_group("demo_11"), r"data/demo_11 has neither actions nor states"),
    (lambda f: f["data/demo_0"].create_dataset("ragged", (5,), h5py.vlen_dtype("f4")), r"data/demo_0/ragged holds objects"),
    (lambda f: f["data/demo_0"].create_dataset("ref", (5,), h5py.ref_dtype), r"data/demo_0/ref holds objects"),
    (lambda f: f["data/demo_0"].__setitem__("away", h5py.ExternalLink("other.hdf5", "/x")), r"data/demo_0/away lies in another file"),
    (lambda f: f["data/demo_0"].__setitem__("gone", h5py.SoftLink("/nowhere")), r"data/demo_0/gone lies in another file, or nowhere"),
    (lambda f: f["data/demo_0"].create_dataset("secret", (5,), "u1", external=[("/etc/passwd", 0, 5)]), r"data/demo_0/secret lies in another file"),
    (lambda f: f["data/demo_0"].__setitem__("loop", f["data/demo_0"]), r"holds a link to itself"),
])
def test_a_robomimic_file_that_cannot_be_read_says_where(robomimic, tmp_path, change, message):
    with h5py.File(tmp_path / "other.hdf5", "w") as f:
        f["x"] = np.zeros(5)
    with pytest.raises(DataError, match=message):
        convert(damaged(robomimic, change), tmp_path / "a.zarr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lift.hdf5", "other.hdf5"]


def test_a_truncated_file_is_told(robomimic, tmp_path):
    robomimic.write_bytes(robomimic.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cannot be opened as HDF5.*do that again"):
        detect(robomimic)


# ---------------------------------------------------------------- D4RL
@pytest.fixture
def d4rl(tmp_path):
    """As D4RL ships its MuJoCo sets: flat arrays, infos, metadata as text; the last trajectory is not finished."""
    path, n = tmp_path / "hopper_medium-v2.hdf5", 100
    with h5py.File(path, "w") as f:
        f.create_dataset("observations", data=RNG.normal(size=(n, 11)).astype(np.float32), compression="gzip")
        f.create_dataset("next_observations", data=RNG.normal(size=(n, 11)).astype(np.float32), compression="gzip")
        f.create_dataset("actions", data=RNG.uniform(-1, 1, (n, 3)).astype(np.float32))
        f.create_dataset("rewards", data=RNG.normal(size=n).astype(np.float32))
        f.create_dataset("terminals", data=np.isin(np.arange(n), [9, 59]))
        f.create_dataset("timeouts", data=np.isin(np.arange(n), [49, 59, 80]))
        f.create_dataset("infos/qpos", data=RNG.normal(size=(n, 6)))
        f.create_dataset("metadata/algorithm", data="SAC")
        f.create_dataset("metadata/policy/fc0/weight", data=RNG.normal(size=(4, 11)))
        f.create_dataset("metadata/policy/nonlinearity", data=b"relu")
    return path


def test_d4rl_is_cut_at_terminals_and_timeouts_and_comes_back(d4rl, tmp_path):
    done = convert(d4rl, tmp_path / "a.zarr", fps=125)
    store = Store.open(done.path)
    assert store.episode_ends.tolist() == [10, 50, 60, 81, 100] and "the last 19 steps are not ended" in done.notes[0]
    assert store.attrs["obs"] == {"observations": "observations"} and done.keys["infos/qpos"] == "infos_qpos"
    assert_same_hdf5(d4rl, convert(done.path, tmp_path / "b.hdf5").path)


def test_a_store_from_elsewhere_becomes_a_d4rl_file(dataset, tmp_path):
    done = convert(dataset, tmp_path / "a.hdf5", format="d4rl")
    assert "observations are pose (3,) side by side" in done.notes[0]
    with h5py.File(done.path) as f:
        assert np.flatnonzero(f["timeouts"][()]).tolist() == [6, 7, 37, 49] and not f["terminals"][()].any()
        np.testing.assert_array_equal(f["observations"], Store.open(dataset).read("pose"))
        assert f["rewards"].dtype == np.float64 and f["infos/image"].shape == (50, 4, 5, 3)


# ---------------------------------------------------------------- Minari
@pytest.fixture
def minari_set(tmp_path, monkeypatch):
    """make(observation_space, action_space, lengths) -> the folder of a dataset that the Minari library wrote."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    def make(obs: gym.Space, act: gym.Space, lengths=(6, 9), **how):
        obs.seed(0)
        act.seed(0)
        stack = lambda space, n: _stacked([space.sample() for _ in range(n)])  # noqa: E731
        buffers = [EpisodeBuffer(id=i, seed=10 + i, options={"goal": 2 * i}, observations=stack(obs, n + 1), actions=stack(act, n),
                                 rewards=RNG.normal(size=n).tolist(), terminations=[False] * n, truncations=[False] * (n - 1) + [True],
                                 infos={"x": RNG.normal(size=(n + 1, 2)), "deep": {"y": np.arange(n + 1)}}) for i, n in enumerate(lengths)]
        minari.create_dataset_from_buffers("mine/set-v0", buffers, observation_space=obs, action_space=act, algorithm_name="by hand", author="me",
                                           author_email="me@example.com", code_permalink="none", description="a test", **how)
        return tmp_path / "sets" / "mine" / "set-v0"
    return make


def _stacked(samples):
    if isinstance(samples[0], dict):
        return {k: _stacked([s[k] for s in samples]) for k in samples[0]}
    if isinstance(samples[0], tuple):
        return tuple(_stacked([s[i] for s in samples]) for i in range(len(samples[0])))
    return samples if isinstance(samples[0], str) else np.stack(samples)


BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
DEEP = gym.spaces.Dict({"arm": gym.spaces.Dict({"q": gym.spaces.Box(-3, 3, (7,), np.float64)}), "goal": gym.spaces.Tuple((BOX, gym.spaces.Discrete(5)))})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("obs, act, seen", [
    (BOX, gym.spaces.Box(-1, 1, (2,), np.float32), ["observations"]),
    (gym.spaces.Discrete(16), gym.spaces.Discrete(4), ["observations"]),
    (DEEP, gym.spaces.Dict({"b": BOX, "a": gym.spaces.Discrete(2)}), ["arm_q", "goal__index_0", "goal__index_1"]),
    (gym.spaces.Dict({"q": BOX, "say": gym.spaces.Text(8)}), BOX, ["q"]),
], ids=["box", "discrete", "dict, tuple", "text"])
def test_minari_comes_back(minari_set, tmp_path, obs, act, seen):
    folder = minari_set(obs, act)
    done = convert(folder, tmp_path / "a.zarr", fps=50)
    store = Store.open(done.path)
    assert (done.format, done.episodes, done.steps) == ("minari", 2, 15) and sorted(store.attrs["obs"]) == seen
    assert store.attrs["task"] == "mine/set-v0" and "infos_deep_y" in store.keys and store.read("action").shape[0] == 15
    back = convert(done.path, tmp_path / "sets" / "back" / "set-v0").path
    assert_same_hdf5(folder / "data/main_data.hdf5", back / "data/main_data.hdf5")
    assert (folder / "data/metadata.json").read_text() == (back / "data/metadata.json").read_text()
    import minari
    episode = next(iter(minari.load_dataset("back/set-v0").iterate_episodes([1])))
    assert len(episode.rewards) == 9 and len(gym.spaces.utils.flatten_space(obs).shape) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("jpeg", [True, False])
def test_minari_images(minari_set, tmp_path, jpeg):
    space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (40, 48, 3), np.uint8), "q": BOX})
    folder = minari_set(space, BOX, jpeg_encoding=jpeg)
    done = convert(folder, tmp_path / "a.zarr", fps=50)
    import minari
    theirs = next(iter(minari.load_dataset("mine/set-v0").iterate_episodes([1]))).observations["image"]
    store = Store.open(done.path)
    assert store.schema["image"] == ((40, 48, 3), np.uint8) and list(store.attrs["obs"]) == ["q"]
    np.testing.assert_array_equal(store.read("image")[6:], theirs[:9])
    back = convert(done.path, tmp_path / "sets" / "back" / "set-v0")
    assert bool(back.notes) == jpeg
    np.testing.assert_array_equal(next(iter(minari.load_dataset("back/set-v0").iterate_episodes([1]))).observations["image"], theirs)


@pytest.mark.filterwarnings("ignore")
def test_a_store_from_elsewhere_opens_in_minari(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    done = convert(dataset, tmp_path / "sets" / "demo-v0", format="minari")
    assert "4 episodes have no last observation" in done.notes[0]
    minari = pytest.importorskip("minari")
    theirs = minari.load_dataset("demo-v0")
    store = Store.open(dataset)
    for i, episode in enumerate(theirs.iterate_episodes()):
        np.testing.assert_array_equal(episode.observations["pose"][:-1], store.episode(i)["pose"])
        np.testing.assert_array_equal(episode.actions, store.episode(i)["action"])
        np.testing.assert_array_equal(episode.rewards, store.episode(i)["reward"])
        assert episode.truncations[-1] and not episode.truncations[:-1].any()
    again = Store.open(convert(done.path, tmp_path / "again.zarr", fps=10).path)
    np.testing.assert_array_equal(again.read("action"), store.read("action"))
    assert read_keep(again)["episodes"][0]["attrs"]["id"] == 0


def test_a_minari_dataset_in_arrow_is_refused(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/data/metadata.json").write_text('{"data_format": "arrow"}')
    with pytest.raises(DataError, match=r"format 'arrow'; hdf5 is read.*data_format='hdf5'"):
        convert(tmp_path / "set", tmp_path / "a.zarr", format="minari")


# ---------------------------------------------------------------- ACT and ALOHA
@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_one_file_an_episode(tmp_path, packed):
    """As ALOHA records: images as they are, or as JPEG padded to one length, by OpenCV, which takes the first colour for blue."""
    Image = pytest.importorskip("PIL.Image")

    def jpeg(x):
        Image.fromarray(np.ascontiguousarray(x[..., ::-1])).save(out := io.BytesIO(), "JPEG", quality=95)
        return np.frombuffer(out.getvalue(), np.uint8)
    (tmp_path / "transfer").mkdir()
    images = {}
    for i in (0, 1, 2, 10):
        n = 3 + i
        with h5py.File(tmp_path / "transfer" / f"episode_{i}.hdf5", "w") as f:
            f.attrs["sim"], f.attrs["compress"] = False, packed
            smooth = np.linspace(0, 255, 40 * 48).reshape(40, 48)
            images[i] = np.stack([np.stack([smooth, 255 - smooth, np.full_like(smooth, 20 * (t % 12))], -1) for t in range(n)]).astype(np.uint8)
            files = [jpeg(x) for x in images[i]]
            length = max(map(len, files))
            f["observations/images/cam_high"] = np.stack([np.pad(x, (0, length - len(x))) for x in files]) if packed else images[i]
            for key in ("qpos", "qvel", "effort"):
                f[f"observations/{key}"] = RNG.normal(size=(n, 14))
            f["action"] = RNG.normal(size=(n, 14))
            if packed:
                f["compress_len"] = np.array([[len(x) for x in files]], np.float32)
    done = convert(tmp_path / "transfer", tmp_path / "a.zarr", fps=50)
    store = Store.open(done.path)
    assert (done.format, done.episodes, sorted(store.attrs["obs"])) == ("aloha", 4, ["effort", "qpos", "qvel"])
    assert store.attrs["action"]["of"] == "qpos" and np.diff(store.episode_ends, prepend=0).tolist() == [3, 4, 5, 13]
    error = store.episode(3)["images_cam_high"].astype(int) - images[10]
    assert np.abs(error).max() <= (12 if packed else 0)  # the colours are in their order
    back = convert(done.path, tmp_path / "back")
    assert bool(back.notes) == packed
    if not packed:
        for i in images:
            assert_same_hdf5(tmp_path / "transfer" / f"episode_{i}.hdf5", back.path / f"episode_{i}.hdf5")
    else:
        again = Store.open(convert(back.path, tmp_path / "b.zarr", fps=50).path)
        np.testing.assert_array_equal(again.read("images_cam_high"), store.read("images_cam_high"))


def test_a_store_from_elsewhere_becomes_one_file_an_episode(dataset, tmp_path):
    back = convert(convert(dataset, tmp_path / "b", format="aloha").path, tmp_path / "c.zarr", fps=10)
    for key in Store.open(dataset).keys:
        np.testing.assert_array_equal(Store.open(back.path).read(key), Store.open(dataset).read(key))
