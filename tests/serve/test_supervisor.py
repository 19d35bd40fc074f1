"""The state machine alone: what leads where, and that nothing leads out of STOP but rearm()."""
import itertools
import math

import pytest

from policy.serve.supervisor import Mode, Supervisor


def driven(*ticks: dict, **options) -> list[Mode]:
    s = Supervisor(**options)
    return [s.update(0.02 * i, **{"covered": False, **tick}) for i, tick in enumerate(ticks)]


PLAN, LATE, MOVING = {"covered": True, "at_rest": False}, {"covered": True, "overdue": "late", "at_rest": False}, {"at_rest": False}


@pytest.mark.parametrize("ticks, modes", [
    ([{}, {}], ["HOLD", "HOLD"]),
    ([{}, PLAN, PLAN], ["HOLD", "RUN", "RUN"]),
    ([PLAN, LATE, LATE, PLAN], ["RUN", "DEGRADED", "DEGRADED", "RUN"]),
    ([PLAN, LATE, MOVING, MOVING, {}], ["RUN", "DEGRADED", "BRAKE", "BRAKE", "HOLD"]),
    ([PLAN, MOVING, PLAN, {"covered": True}], ["RUN", "BRAKE", "BRAKE", "HOLD"]),  # at rest first, whatever arrives meanwhile
    ([PLAN, MOVING, {}, {"covered": True}], ["RUN", "BRAKE", "HOLD", "RUN"]),
    ([PLAN, {**PLAN, "fault": "driver"}, MOVING, {}, {"covered": True}], ["RUN", "BRAKE", "BRAKE", "STOP", "STOP"]),
    ([{}, {"fault": "driver"}, {"covered": True}], ["HOLD", "STOP", "STOP"]),
    ([PLAN, MOVING, {"fault": "driver", "at_rest": False}, {}], ["RUN", "BRAKE", "BRAKE", "STOP"]),
])
def test_what_leads_where(ticks, modes):
    assert driven(*ticks) == modes


def test_patience_ends_a_degraded_run_and_holding_ends_in_a_stop():
    ticks = [PLAN] + 10 * [LATE]
    assert driven(*ticks) == ["RUN"] + 10 * ["DEGRADED"]
    assert driven(*ticks, patience=0.05) == ["RUN"] + 3 * ["DEGRADED"] + 7 * ["BRAKE"]
    assert driven(*ticks, patience=0.0)[:2] == ["RUN", "BRAKE"]
    assert driven(*50 * [{}], hold=0.5).index(Mode.STOP) == 25


def test_only_rearming_leads_out_of_a_stop_and_every_way_there_is_at_rest():
    """All sequences of four periods from every mode that two periods reach."""
    choices = [dict(covered=c, overdue=o, at_rest=r, fault=f) for c in (True, False) for o in ("", "late") for r in (True, False) for f in ("", "fault")]
    for ticks in itertools.product(choices, repeat=3):
        s = Supervisor(hold=0.05)
        before = s.mode
        for i, tick in enumerate(ticks):
            mode = s.update(0.02 * i, **tick)
            if before is Mode.STOP:
                assert mode is Mode.STOP
            if mode is Mode.STOP and before is not Mode.STOP:
                assert tick["at_rest"] and before in (Mode.BRAKE, Mode.HOLD)
            if mode in (Mode.RUN, Mode.DEGRADED):
                assert tick["covered"] and not any(t["fault"] for t in ticks[:i + 1])
            if before in (Mode.RUN, Mode.DEGRADED) and not tick["covered"]:
                assert mode is Mode.BRAKE
            before = mode
        if s.mode is Mode.STOP:
            s.rearm(1.0)
            assert s.mode is Mode.HOLD and not s.fault
        else:
            with pytest.raises(ValueError, match="nothing to re-arm"):
                s.rearm(1.0)


@pytest.mark.parametrize("options", [{"patience": -1.0}, {"hold": 0.0}, {"patience": math.nan}])
def test_odd_settings_are_refused(options):
    with pytest.raises(ValueError, match="patience"):
        Supervisor(**options)
