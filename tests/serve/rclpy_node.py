"""The far side of test_ros2.py that nobody here wrote: a real ROS 2 node. Run by the python of a venv with rclpy from pip, without this repository.

Started with one JSON argument; prints "ready", and after `seconds`, or when stdin ends, one line of JSON.
"""
import json
import select
import sys
import time

import rclpy
from rclpy.qos import QoSPresetProfiles, qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory


def main(options: dict) -> None:
    rclpy.init()
    node = rclpy.create_node("controller")
    latency, sizes, bad, published = [], [], [], [0]

    def trajectory(message: JointTrajectory) -> None:
        latency.append(time.time() - message.header.stamp.sec - message.header.stamp.nanosec * 1e-9)
        sizes.append(len(message.points))
        if list(message.joint_names) != options["joints"] or any(len(p.positions) != len(options["joints"]) for p in message.points):
            bad.append(str(message))

    def command(message: Float64MultiArray) -> None:
        latency.append(0.0)
        sizes.append(len(message.data))

    def tick() -> None:
        message = JointState()
        message.header.stamp = node.get_clock().now().to_msg()
        message.name = options["joints"][::-1]
        message.position = [0.1 * i for i in range(len(options["joints"]))][::-1]
        message.velocity = [0.01] * len(options["joints"])
        publisher.publish(message)
        published[0] += len(latency) > 0  # since the driver is connected

    kind, callback = {"joint_trajectory": (JointTrajectory, trajectory), "forward_command": (Float64MultiArray, command)}[options["controller"]]
    node.create_subscription(kind, options["topic"], callback, QoSPresetProfiles.SYSTEM_DEFAULT.value)  # as the controllers of ros2_controllers
    publisher = node.create_publisher(JointState, options["states"], qos_profile_sensor_data)
    node.create_timer(0.01, tick)
    print("ready", flush=True)
    end = time.monotonic() + options["seconds"]
    while time.monotonic() < end and not select.select([sys.stdin], [], [], 0)[0]:
        rclpy.spin_once(node, timeout_sec=0.05)
    senders = [[i.topic_type, i.qos_profile.reliability.name] for i in node.get_publishers_info_by_topic(options["topic"])]
    print(json.dumps({"rmw": rclpy.utilities.get_rmw_implementation_identifier(), "latency": latency, "points": sizes, "bad": bad, "published": published[0],
                      "senders": senders}), flush=True)
    rclpy.shutdown()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
