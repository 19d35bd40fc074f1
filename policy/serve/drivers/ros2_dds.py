"""A place in a ROS 2 domain without ROS: Cyclone DDS set up to meet any vendor's nodes, and the reasons when it does not meet them."""
import os
from typing import Any

from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsParticipant, BuiltinTopicDcpsPublication, BuiltinTopicDcpsSubscription
from cyclonedds.core import DDSException, InstanceState, Policy, Qos
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic

from policy.serve.robot import DriverError

# Fast DDS 3 (vendor 1.15) describes types in a way that Cyclone takes for invalid, and Cyclone then hears nothing at all (cyclonedds #2333).
_CONFIG = """<CycloneDDS><Domain Id="any"><General>{interface}</General>
<Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>32</MaxAutoParticipantIndex>{peers}</Discovery>
<Compatibility><IgnoreTypeInformation>1.15</IgnoreTypeInformation></Compatibility></Domain></CycloneDDS>"""
_LOCAL = '<Interfaces><NetworkInterface address="127.0.0.1" multicast="false"/></Interfaces><AllowMulticast>false</AllowMulticast>'


def configuration(network: str) -> str:
    """Cyclone's XML. network: localhost, subnet (the interface that Cyclone picks, discovery by multicast) or the name of an interface.

    What CYCLONEDDS_URI holds is added and wins.
    """
    if network == "localhost":
        own = _CONFIG.format(interface=_LOCAL, peers='<Peers><Peer Address="127.0.0.1"/></Peers>')
    elif network == "subnet":
        own = _CONFIG.format(interface="", peers="")
    elif all(c.isalnum() or c in "_-.@:" for c in network) and network:
        own = _CONFIG.format(interface=f'<Interfaces><NetworkInterface name="{network}"/></Interfaces>', peers="")
    else:
        raise ValueError(f"network={network!r} must be localhost, subnet or the name of an interface such as eth0")
    return ",".join(filter(None, [own, os.environ.get("CYCLONEDDS_URI", "")]))


def domain_of(domain: int | None) -> int:
    """The domain's number, of ROS_DOMAIN_ID or 0 when None. ValueError when ROS could not use it."""
    text = str(domain) if domain is not None else os.environ.get("ROS_DOMAIN_ID") or "0"
    if not text.isdecimal() or int(text) > 232:
        raise ValueError(f"the ROS domain {text!r} must be a whole number from 0 to 232 (argument domain, or ROS_DOMAIN_ID)")
    return int(text)


class Link:
    """A DDS participant with the readers and writers of one driver.   Topics are spelled as in ROS: /joint_states."""

    def __init__(self, domain: int, network: str):
        self.domain, self.network = domain, network
        self.entities: list[Any] = []
        try:
            self.entities.append(Domain(domain, configuration(network)))
            self.participant = DomainParticipant(domain)
            self.entities.append(self.participant)
        except DDSException as e:
            self.close()
            raise DriverError(f"no access to ROS domain {domain} over {network}: {e} A process can be in a domain once: close() the driver that is. Otherwise "
                              "check the interface's name and CYCLONEDDS_URI") from e

    def writer(self, topic: str, kind: type) -> DataWriter[Any]:
        """Reliable, volatile, newest message only, so that a write never waits."""
        writer = DataWriter(self.participant, self._topic(topic, kind), _qos(Policy.Reliability.Reliable(100_000_000), 1))
        self.entities.append(writer)
        return writer

    def reader(self, topic: str, kind: type) -> DataReader[Any]:
        """Best effort, volatile: any publisher will do."""
        reader = DataReader(self.participant, self._topic(topic, kind), _qos(Policy.Reliability.BestEffort, 8))
        self.entities.append(reader)
        return reader

    def _topic(self, topic: str, kind: type) -> Topic[Any]:
        made: Topic[Any] = Topic(self.participant, f"rt{topic}", kind)
        self.entities.append(made)
        return made

    def close(self) -> None:
        while self.entities:
            self.entities.pop().__del__()  # now, in this order, not when the garbage collector likes

    def why_not(self, topic: str, kind: type, what: str) -> str:
        """Why nothing is matched on `topic`, as far as discovery knows.   what: subscription or publication, the one that is missing."""
        mine = self.participant.guid
        builtin = BuiltinTopicDcpsSubscription if what == "subscription" else BuiltinTopicDcpsPublication
        ends = [e for e in _read(self.participant, builtin) if e.participant_key != mine and e.topic_name.startswith("rt/")]
        others = {p.key for p in _read(self.participant, BuiltinTopicDcpsParticipant)} - {mine}
        want = _ros_type(kind.__idl_typename__)  # type: ignore[attr-defined]
        here = [e for e in ends if e.topic_name == f"rt{topic}"]
        wrong = sorted({_ros_type(e.type_name) for e in here} - {want})
        elsewhere = sorted({e.topic_name[2:] for e in ends if _ros_type(e.type_name) == want and e not in here})
        if wrong:
            return f"the {what} there is of type {', '.join(wrong)} instead of {want}"
        if here:
            return f"there is a {what} of the right type whose QoS does not fit: {here[0].qos}"
        if elsewhere:
            return f"{what}s of {want} are on {', '.join(elsewhere)}: is one of them meant?"
        if others:
            return (f"{len(others)} DDS participant{'s' * (len(others) > 1)} seen, but no {what} of {want}: is the controller loaded and active "
                    "(ros2 control list_controllers)?")
        return (f"no other DDS participant is seen in domain {self.domain} over {self.network}: compare ROS_DOMAIN_ID, "
                "ROS_AUTOMATIC_DISCOVERY_RANGE (not OFF) and RMW_IMPLEMENTATION (rmw_fastrtps_cpp or rmw_cyclonedds_cpp, not zenoh) on the robot, the "
                "argument network here, and the firewall")


def _qos(reliability: Any, depth: int) -> Qos:
    return Qos(reliability, Policy.Durability.Volatile, Policy.History.KeepLast(depth), Policy.DataRepresentation(use_cdrv0_representation=True))


def _read(participant: DomainParticipant, builtin: Any) -> list[Any]:
    reader = BuiltinDataReader(participant, builtin)
    found = [s for s in reader.read(10_000) if s.sample_info.valid_data and s.sample_info.instance_state == InstanceState.Alive]
    reader.__del__()
    return found


def _ros_type(dds: str) -> str:
    """sensor_msgs::msg::dds_::JointState_ -> sensor_msgs/msg/JointState"""
    return dds.replace("::dds_::", "/").replace("::", "/").removesuffix("_") if "::dds_::" in dds else f"{dds} (not a ROS 2 name)"
