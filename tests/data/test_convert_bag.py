"""ROS 2 bags: values that are known functions of time, written by rosbags and by mcap's own writer, read back on a grid; damage; pauses."""
import sqlite3
import struct
from pathlib import Path

import bag_cases as cases
import numpy as np
import pytest
from bag_cases import JOINTS, LATE, arm, header, joint, lone, pixels, write_bag
from mcap.writer import CompressionType
from rosbags.rosbag2.enums import CompressionMode
from scipy.spatial.transform import Rotation, Slerp

from policy.data import DataError, Store
from policy.data.convert.core import convert, detect, open_source


def episodes(path: Path, fps: float = 10, **options):
    source = open_source(path, fps=fps, **options)
    found = list(source.episodes())
    for episode in found:
        assert {k: (x.shape[1:], x.dtype) for k, x in episode.items()} == source.schema
        assert len({len(x) for x in episode.values()}) == 1
    return found, source


def written(folder: Path, how: str, messages) -> Path:
    if how in ("zstd", "lz4", "none"):
        return lone(folder / "a.mcap", messages, CompressionType[how.upper()])
    storage, _, mode = how.partition("+")
    return write_bag(folder / "bag", messages, storage, CompressionMode[mode.upper()] if mode else CompressionMode.NONE)


@pytest.mark.parametrize("how", ["mcap", "sqlite3", "mcap+storage", "sqlite3+file", "sqlite3+message", "zstd", "lz4", "none"])
def test_joints_by_name_poses_commands_and_images_on_the_grid(tmp_path, how):
    path = written(tmp_path, how, arm())
    assert detect(path) == "rosbag"
    (e,), source = episodes(path, topics={"/joint_states": {"joints": list(JOINTS)}, "/arm/command": None, "/tool": None, "/camera/image_raw": None})
    n = len(e["tool/position"])
    t = 0.11 + LATE / 1e9 + np.arange(n) / 10  # the command begins last, and a trajectory counts from its receipt
    assert n == 18 and source.fps == 10
    np.testing.assert_allclose(e["joint_states/position"], np.stack([joint(i, t) for i in range(3)], 1), atol=1e-9)  # 1 us of rounding
    np.testing.assert_allclose(e["joint_states/velocity"], np.tile([0.1, 0.2, 0.3], (n, 1)))
    np.testing.assert_allclose(e["tool/position"], np.outer(t, [1, 2, -1]), atol=1e-9)
    np.testing.assert_allclose(e["arm/command/positions"], np.outer(t - LATE / 1e9, [1, 2, 3]), atol=1e-9)
    z = Rotation.from_quat(e["tool/orientation"]).as_rotvec()
    np.testing.assert_allclose(z, np.outer(t, [0, 0, 1]), atol=1e-6)
    assert (np.sum(e["tool/orientation"][1:] * e["tool/orientation"][:-1], 1) > 0).all()
    np.testing.assert_array_equal(e["camera/image_raw"], np.stack([pixels(int(np.floor((x - 0.05 + 1e-9) * 10))) for x in t]))
    assert (source.action, source.semantics.kind, source.semantics.of) == ("arm/command/positions", "absolute", "joint_states/position")
    assert source.attrs["names"]["joint_states/position"] == list(JOINTS)


def test_the_clock_of_receipt_is_late_by_what_the_recorder_was_late(tmp_path):
    path = write_bag(tmp_path / "bag", [m for m in arm() if m[0] == "/joint_states"])
    (by_header,), _ = episodes(path)
    (by_receipt,), _ = episodes(path, clock="receive")
    np.testing.assert_allclose(by_header["joint_states/position"], by_receipt["joint_states/position"], atol=1e-9)  # one topic: both clocks shift alike
    messages = [*arm(1.0), ("/number", 0.2, cases.T["std_msgs/msg/Float64"](1.0)), ("/number", 0.9, cases.T["std_msgs/msg/Float64"](2.0))]
    path = write_bag(tmp_path / "two", messages)
    topics = {"/joint_states": {"joints": ["lift"], "fields": ["position"]}, "/number": None}
    (a,), _ = episodes(path, topics=topics)
    (b,), _ = episodes(path, topics=topics, clock="receive")
    np.testing.assert_allclose(a["joint_states/position"][0], joint(0, 0.2 + LATE / 1e9), atol=1e-9)  # a number has no header: receipt
    np.testing.assert_allclose(b["joint_states/position"][0], joint(0, 0.2), atol=1e-9)


def test_orientations_between_messages_are_those_of_scipy(tmp_path):
    rng = np.random.default_rng(0)
    at = np.sort(rng.uniform(0, 2, 40))
    turns = Rotation.random(40, random_state=1)
    quaternion = cases.T["geometry_msgs/msg/Quaternion"]
    message = cases.T["geometry_msgs/msg/QuaternionStamped"]
    path = write_bag(tmp_path / "bag", [("/q", t, message(header(t), quaternion(*q))) for t, q in zip(at, turns.as_quat(), strict=True)])
    (e,), _ = episodes(path, 50)
    t = np.round(at[0] * 1e9) / 1e9 + np.arange(len(e["q"])) / 50
    error = (Slerp(at, turns)(np.clip(t, at[0], at[-1])).inv() * Rotation.from_quat(e["q"])).magnitude()
    assert error.max() < 1e-6


@pytest.mark.parametrize("encoding,pad,big", [("rgb8", 0, False), ("bgr8", 5, False), ("mono8", 3, False), ("16UC1", 0, False), ("16UC1", 2, True),
                                              ("mono16", 0, False), ("rgba8", 1, False), ("bgra8", 0, False), ("32FC1", 4, True)])
def test_images_are_those_that_were_sent(tmp_path, encoding, pad, big):
    path = write_bag(tmp_path / "bag", [("/c", i / 10, cases.image(i / 10, i, encoding, pad, big)) for i in range(5)])
    (e,), source = episodes(path)
    np.testing.assert_array_equal(e["c"], np.stack([pixels(i, encoding) for i in range(5)]))
    assert source.units.get("c") == ("mm" if "16" in encoding else "m" if "32" in encoding else None)


@pytest.mark.parametrize("format,head", [("png", b""), ("16UC1; compressedDepth png", bytes(12)), ("rgb8; jpeg compressed bgr8", b"")])
def test_compressed_images(tmp_path, format, head):
    smooth = np.add.outer(np.arange(48) * 2, np.arange(64))[..., None] * np.ones(3)
    depth = pixels(3, "16UC1")
    x = depth if head else smooth.astype(np.uint8)
    path = write_bag(tmp_path / "bag", [("/c", i / 10, cases.compressed(i / 10, x, format, head)) for i in range(3)])
    (e,), _ = episodes(path)
    assert e["c"].dtype == x.dtype and np.abs(e["c"][1].astype(int) - x).max() <= (4 if "jpeg" in format else 0)


def test_the_other_messages(tmp_path):
    t = cases.T
    xyz, q = t["geometry_msgs/msg/Vector3"](1.0, 2.0, 3.0), t["geometry_msgs/msg/Quaternion"](0.0, 0.0, 1.0, 0.0)
    point, cov = t["geometry_msgs/msg/Point"](4.0, 5.0, 6.0), np.zeros(36)
    pose, twist = t["geometry_msgs/msg/Pose"](point, q), t["geometry_msgs/msg/Twist"](xyz, t["geometry_msgs/msg/Vector3"](7.0, 8.0, 9.0))
    layout = t["std_msgs/msg/MultiArrayLayout"]([], 0)

    def at(s: float):
        h = header(s)
        return {"twist": twist, "twist_stamped": t["geometry_msgs/msg/TwistStamped"](h, twist), "wrench": t["geometry_msgs/msg/WrenchStamped"](
                    h, t["geometry_msgs/msg/Wrench"](xyz, xyz)),
                "transform": t["geometry_msgs/msg/TransformStamped"](h, "tool", t["geometry_msgs/msg/Transform"](xyz, q)),
                "point": t["geometry_msgs/msg/PointStamped"](h, point), "vector": t["geometry_msgs/msg/Vector3Stamped"](h, xyz),
                "imu": t["sensor_msgs/msg/Imu"](h, q, np.zeros(9), xyz, np.zeros(9), xyz, np.zeros(9)),
                "odometry": t["nav_msgs/msg/Odometry"](h, "base", t["geometry_msgs/msg/PoseWithCovariance"](pose, cov),
                                                       t["geometry_msgs/msg/TwistWithCovariance"](twist, cov)),
                "flag": t["std_msgs/msg/Bool"](s > 0.25), "count": t["std_msgs/msg/Int32"](round(s * 10)), "width": t["std_msgs/msg/Float32"](0.5),
                "bytes": t["std_msgs/msg/UInt8MultiArray"](layout, np.array([1, 255], np.uint8)), "pose": pose}
    (e,), source = episodes(write_bag(tmp_path / "bag", [(f"/{k}", s / 10, m) for s in range(6) for k, m in at(s / 10).items()]))
    want = {"twist/linear": [1, 2, 3], "twist/angular": [7, 8, 9], "twist_stamped/linear": [1, 2, 3], "wrench/torque": [1, 2, 3],
            "transform/translation": [1, 2, 3], "transform/rotation": [0, 0, 1, 0], "point": [4, 5, 6], "vector": [1, 2, 3],
            "imu/linear_acceleration": [1, 2, 3], "imu/orientation": [0, 0, 1, 0],
            "odometry/position": [4, 5, 6], "odometry/angular": [7, 8, 9], "width": 0.5, "bytes": [1, 255], "pose/position": [4, 5, 6]}
    for key, value in want.items():
        np.testing.assert_array_equal(e[key], np.broadcast_to(value, e[key].shape), err_msg=key)
    assert e["flag"].dtype == bool and e["flag"].tolist() == [False] * 3 + [True] * (len(e["flag"]) - 3) and e["bytes"].dtype == np.uint8
    assert e["count"].tolist() == list(range(len(e["count"]))) and e["count"].dtype == np.int32
    assert source.units["wrench/force"] == "N" and source.units["imu/angular_velocity"] == "rad/s"


def test_two_senders_of_some_joints_each_make_one_robot(tmp_path):
    some = [("/joint_states", k / 50, cases.joint_state(k / 50, ("lift", "turn"))) for k in range(60)]
    rest = [("/joint_states", 0.004 + k / 20, cases.joint_state(0.004 + k / 20, ("grip",))) for k in range(20)]
    (e,), _ = episodes(write_bag(tmp_path / "bag", some + rest), 20, topics={"/joint_states": {"joints": ["grip", "lift"]}})
    t = 0.004 + np.arange(len(e["joint_states/position"])) / 20
    np.testing.assert_allclose(e["joint_states/position"], np.stack([joint(2, t), joint(0, t)], 1), atol=1e-9)


def test_a_pause_is_an_error_or_ends_the_episode(tmp_path):
    path = write_bag(tmp_path / "bag", [m for m in arm(1.0) + arm(1.0, start=3.0) if m[0] != "/arm/command"])
    with pytest.raises(DataError, match=r"pauses for 2.*on_gap: split"):
        episodes(path)
    found, source = episodes(path, on_gap="split", topics={"/joint_states": {"joints": ["turn"]}, "/camera/image_raw": None})
    assert len(found) == 2 and "2 episodes" in source.notes[-1]
    np.testing.assert_allclose(found[1]["joint_states/position"][0], joint(1, 3.05), atol=1e-9)  # where the images come back
    np.testing.assert_array_equal(found[1]["camera/image_raw"][0], pixels(0))
    (whole,), _ = episodes(path, gap=3)
    assert len(whole["tool/position"]) > 35


def test_a_folder_of_bags_is_episodes_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in (10, 9, 1):
        write_bag(folder / f"take_{i}", [("/x", k / 10, cases.array([i, k])) for k in range(4)])
    found, source = episodes(folder)
    assert [e["x"][0, 0] for e in found] == [1, 9, 10] and source.count == 3
    assert [e["bag"] for e in source.keep["episodes"]] == ["take_1", "take_9", "take_10"]
    write_bag(folder / "take_11", [("/y", k / 10, cases.array([k])) for k in range(4)])
    with pytest.raises(DataError, match=r"take_11 holds no messages for x"):
        episodes(folder)


def test_a_killed_recorder_s_split_bag_is_one_bag(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for part in range(2):
        lone(folder / f"run_{part}.mcap", [("/x", part + k / 10, cases.array([part, k])) for k in range(10)])
    (e,), source = episodes(folder)
    assert len(e["x"]) == 20 and "stopped before" in source.notes[0]


@pytest.mark.parametrize("how", ["zstd", "sqlite3"])
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_a_truncated_bag_says_what_can_be_had_and_gives_it(tmp_path, how, share):
    messages = [("/x", k / 100, cases.array(np.full(50, k) + np.random.default_rng(k).normal(size=50))) for k in range(600)]
    path = written(tmp_path, how, messages)
    file = path if path.is_file() else next(path.glob("*.db3"))
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * share)])
    with pytest.raises(DataError, match=r"(ends early|no whole sqlite3 bag).*messages.*can be (read|recovered)|no message can be read"):
        episodes(path)
    if how == "zstd":
        (e,), source = episodes(path, 100, damaged="keep")
        assert 200 < len(e["x"]) < 600 and "were taken" in source.notes[-1]
        np.testing.assert_allclose(e["x"][:, 7], [m[2].data[7] for m in messages[:len(e["x"])]])


def test_garbage_is_told(tmp_path):
    noise = np.random.default_rng(0).bytes(4096)
    for name in ("a.mcap", "a.db3"):
        (tmp_path / name).write_bytes(noise)
        with pytest.raises(DataError, match="no message can be read: copy it again"):
            open_source(tmp_path / name, fps=10)
    path = lone(tmp_path / "b.mcap", arm(0.5), CompressionType.NONE)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):  # the checksum of a chunk
        episodes(path)
    empty = tmp_path / "c.db3"
    with sqlite3.connect(empty) as c:
        c.execute("CREATE TABLE other (x)")
    with pytest.raises(DataError, match="no such table"):
        open_source(empty, fps=10)


def test_a_chunk_that_would_not_fit_in_memory_is_refused(tmp_path):
    path = lone(tmp_path / "a.mcap", arm(0.5), chunk=10**7)
    raw = bytearray(path.read_bytes())
    at = 8
    while raw[at] != 6:  # opcode of a chunk
        at += 9 + struct.unpack_from("<Q", raw, at + 1)[0]
    struct.pack_into("<Q", raw, at + 9 + 16, 2**40)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="holds a chunk of 1099511627776 bytes"):
        episodes(path)


def test_definitions_in_a_bag_are_not_used(tmp_path):
    evil = b"float64 x\n__import__('pathlib').Path('/tmp/dipole-owned').touch()\n"
    (e,), _ = episodes(lone(tmp_path / "a.mcap", [("/x", k / 10, cases.array([k])) for k in range(5)], definition=evil))
    assert e["x"].ravel().tolist() == [0, 1, 2, 3, 4] and not Path("/tmp/dipole-owned").exists()


def test_choosing_topics(tmp_path):
    string = cases.T["std_msgs/msg/String"]
    path = write_bag(tmp_path / "bag", [*arm(1.0), ("/said", 0.5, string("hello")), ("/said", 0.6, string("!"))])
    _, source = episodes(path)
    assert any("/said is left out" in n and "String" in n for n in source.notes)
    with pytest.raises(DataError, match="std_msgs/msg/String, which is not read"):
        episodes(path, topics=["/said"])
    with pytest.raises(ValueError, match=r"'/joints' is not in.*\n  /joint_states: sensor_msgs/msg/JointState, 100 messages, 100 Hz"):
        episodes(path, topics=["/joints"])
    with pytest.raises(ValueError, match="has no joint 'arm'; it has"):
        episodes(path, topics={"/joint_states": {"joints": ["arm"]}})
    with pytest.raises(ValueError, match="holds no 'effort'"):
        episodes(path, topics={"/joint_states": {"fields": ["effort"]}})
    with pytest.raises(DataError, match=r"say at which one steps are wanted: fps=20"):
        open_source(path)
    with pytest.raises(DataError, match=r"the topics share 0.000 s"):
        episodes(write_bag(tmp_path / "apart", arm(0.5)[:50] + [m for m in arm(0.5, start=9) if m[0] == "/tool"]))


def test_a_bag_becomes_a_store(tmp_path):
    done = convert(write_bag(tmp_path / "bag", arm()), tmp_path / "a.zarr", fps=20)
    store = Store.open(done.path)
    assert store.fps == 20 and store.episodes == 1 and store.schema["camera_image_raw"] == ((6, 8, 3), np.dtype("uint8"))
    assert store.attrs["action"]["of"] in store.keys and store.attrs["obs"].keys() >= {"joint_states_position", "tool_orientation"}
    assert store.units["tool_position"] == "m" and "action" in store.keys
