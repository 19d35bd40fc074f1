"""Every fault of `dipole data validate` as something that can be planted into a clean dataset, in a place that is told."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import planted_meaning as meaning
import planted_motion as motion
from recordings import Arrays


@dataclass(frozen=True)
class Fault:
    """plant(data) changes a dataset in place and returns where: [(key, channel or None, episode or None, first step, end step)]; found as code, severity.

    also: codes that are true of the same fault as well.
    """
    code: str
    severity: str
    plant: Callable[[Arrays], list[tuple]]
    also: tuple[str, ...] = ()


FAULTS = {
    "nan": Fault("not_finite", "error", motion.nan),
    "infinity": Fault("not_finite", "error", motion.infinite),
    "short": Fault("short_episode", "warning", motion.short),
    "long": Fault("odd_length", "note", motion.long),
    "idle start": Fault("idle_start", "note", motion.idle(2, 0)),
    "idle middle": Fault("idle_middle", "note", motion.idle(3, 60)),
    "idle end": Fault("idle_end", "note", motion.idle(4, -1)),
    "teleport": Fault("jump", "warning", motion.teleport),
    "glitch": Fault("glitch", "warning", motion.glitch),
    "action leaps": Fault("jump", "note", motion.action_jump),
    "border": Fault("missed_border", "error", motion.border),
    "constant": Fault("constant", "note", motion.constant),
    "dead": Fault("dead_sensor", "warning", motion.dead),
    "stuck": Fault("stuck_sensor", "warning", motion.stuck, also=("jump",)),
    "clipped": Fault("clipped", "warning", motion.clipped),
    "quaternion norm": Fault("quaternion_norm", "warning", motion.quaternion_norm),
    "quaternion zero": Fault("quaternion_norm", "warning", motion.quaternion_zero),
    "quaternion sign": Fault("quaternion_sign", "warning", motion.quaternion_sign),
    "wrap": Fault("angle_wrap", "warning", motion.wrap(2 * np.pi, 0)),
    "wrap at 180": Fault("angle_wrap", "warning", motion.wrap(360.0, 180)),
    "axis angle": Fault("axis_angle_wrap", "warning", motion.axis_angle),
    "time gap": Fault("time_gap", "warning", motion.time_gap),
    "time order": Fault("time_order", "error", motion.time_order, also=("time_gap",)),
    "time repeat": Fault("time_repeat", "warning", motion.time_repeat),
    "jitter": Fault("time_jitter", "warning", motion.jitter),
    "jitter of one": Fault("time_jitter", "warning", motion.jitter_of_one),
    "rate": Fault("rate", "error", motion.rate),
    "late": Fault("action_lag", "error", meaning.late(5)),
    "late in one": Fault("lag_mixed", "error", meaning.late_in([7], 5)),
    "late in half": Fault("lag_mixed", "error", meaning.late_in(range(0, 24, 2), 5)),
    "early in one": Fault("lag_mixed", "warning", meaning.late_in([7], -5)),
    "copy": Fault("action_lag", "error", meaning.copy_of_state),
    "copy of three": Fault("action_lag", "error", meaning.copy_of_three),
    "kind": Fault("action_kind", "error", meaning.kind),
    "kind of delta": Fault("action_kind", "error", meaning.kind_of_delta),
    "mixed": Fault("action_mixed", "error", meaning.mixed),
    "duplicate": Fault("duplicate", "warning", meaning.duplicate),
    "near duplicate": Fault("near_duplicate", "warning", meaning.near_duplicate),
    "overlap": Fault("overlap", "warning", meaning.overlap),
    "degrees": Fault("units", "warning", meaning.degrees),
    "degrees in action": Fault("units", "warning", meaning.degrees_in_action),
    "degrees in some": Fault("units_mixed", "error", meaning.degrees_in_some),
    **{f"{key} times {f:g}": Fault("units_mixed", "error", meaning.scaled(key, f)) for key in ("pose", "joints", "action") for f in (100, 10, 0.1, 0.01)},
    **{f"both times {f:g}": Fault("units_mixed", "error", meaning.scaled("joints", f, ("action",))) for f in (100, 10, 0.1, 0.01)},
    **{f"three of the action times {f:g}": Fault("units_mixed", "error", meaning.scaled("action", f, n=3)) for f in (100, 10, 0.1, 0.01)},
    "action exchanged": Fault("action_exchanged", "error", meaning.exchanged),
    "action flipped": Fault("action_flipped", "error", meaning.flipped),
    "gripper inverted": Fault("action_flipped", "error", meaning.gripper_inverted),
    "noise": Fault("noise", "warning", meaning.noise("pose", 1, 0.03)),
    "noise of joints": Fault("noise", "warning", meaning.noise("joints", 1, 0.05)),
    "noise of the action": Fault("noise", "warning", meaning.noise("action", 1, 0.1)),
    "quaternion order": Fault("quaternion_order", "error", meaning.quaternion_order),
    "whole numbers": Fault("integer_action", "note", meaning.whole_numbers),
    "half, near": Fault("precision", "note", meaning.half_but_near),
    "image normalised": Fault("image_range", "warning", meaning.image_normalised),
    "half": Fault("precision", "warning", meaning.half),
    "epoch": Fault("precision", "warning", meaning.epoch),
    "outlier": Fault("outlier", "warning", meaning.outlier, also=("glitch",)),
    "huge": Fault("huge", "error", meaning.huge, also=("glitch", "outlier")),
    "image half": Fault("image_range", "error", meaning.image_half),
    "image float": Fault("image_range", "warning", meaning.image_float),
    "image mixed": Fault("image_range", "error", meaning.image_mixed),
    "image lost": Fault("image_range", "error", meaning.image_lost),
    "black": Fault("image_blank", "warning", meaning.black),
    "frozen": Fault("image_frozen", "warning", meaning.frozen),
}
