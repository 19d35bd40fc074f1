"""The doctor on sick machines: each illness is faked and must be found, named and answered."""
import importlib.metadata
import os
import sys
import time

import pytest

from scripts import doctor
from scripts.doctor import FAIL, OK, WARN, Finding

REQUIRES = ["rich<16,>=13.9", 'mujoco<4,>=3.3; extra == "sim"', 'gymnasium<2,>=1.1; extra == "sim"']


@pytest.fixture
def installed(monkeypatch):
    """A machine with exactly these packages."""
    def having(**versions):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    return having


def test_packages_in_range_are_listed_with_their_versions(installed):
    installed(rich="15.0.0", mujoco="3.8.1", gymnasium="1.4.0")
    assert doctor.packages("") == Finding("packages: core", OK, "rich 15.0.0")
    assert doctor.packages("sim") == Finding("packages: sim", OK, "mujoco 3.8.1, gymnasium 1.4.0")


def test_a_missing_package_is_named_with_its_pip_line(installed):
    installed(mujoco="3.8.1")
    core, sim = doctor.packages(""), doctor.packages("sim")
    assert core.status == FAIL and "rich" in core.found and "pip install" in core.fix
    assert sim.status == WARN and sim.found == "missing: gymnasium" and "dipole[sim]" in sim.fix


def test_an_extra_nobody_installed_is_fine(installed):
    installed(rich="15.0.0")
    assert doctor.packages("sim").status == OK


def test_a_version_out_of_range_is_named_with_the_range(installed):
    installed(rich="15.0.0", mujoco="4.0.0", gymnasium="1.4.0")
    sim = doctor.packages("sim")
    assert sim.status == WARN and "mujoco 4.0.0 is outside <4,>=3.3" in sim.found


def test_dipole_itself_not_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "requires", absent)
    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    assert doctor.extras() == [""]
    assert doctor.packages("").status == FAIL and "make install" in doctor.packages("").fix


@pytest.fixture
def backends(monkeypatch):
    """Replaces drawing: {backend: (drawn, what)}."""
    pytest.importorskip("mujoco")

    def are(chosen, **results):
        monkeypatch.setenv("MUJOCO_GL", chosen)
        monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
        monkeypatch.setattr(doctor, "draw", lambda backend, timeout: results[backend])
    return are


def test_a_hanging_backend_is_left_after_the_time_limit():
    start = time.perf_counter()
    drawn, what = doctor.draw("egl", timeout=0.5, code="import time; time.sleep(60)")
    assert not drawn and what == "hung for 0.5 s" and time.perf_counter() - start < 5


def test_a_crashing_backend_is_a_finding_not_a_crash():
    assert doctor.draw("egl", 20, code="raise OSError('no libEGL')") == (False, "OSError: no libEGL")
    assert doctor.draw("egl", 20, code="import os; os.abort()") == (False, "died with exit code -6")


def test_the_probe_sets_the_backend_it_names(monkeypatch):
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")  # left over by an earlier import of mujoco; would contradict osmesa
    code = "import os; print(os.environ['MUJOCO_GL'], os.environ.get('PYOPENGL_PLATFORM'))"
    assert doctor.draw("osmesa", 20, code=code) == (True, "osmesa None")


def test_a_hanging_egl_with_a_working_osmesa_says_what_to_export(backends):
    backends("", egl=(False, "hung for 20 s"), osmesa=(True, "3 ms"))
    found = doctor.graphics()
    assert found.status == WARN and "egl: hung for 20 s" in found.found and found.fix == "export MUJOCO_GL=osmesa"


def test_the_backend_as_set_comes_first_and_is_enough(backends):
    backends("glfw", glfw=(True, "1 ms"))
    assert doctor.graphics() == Finding("graphics", OK, "glfw: 1 ms")


def test_no_backend_at_all_fails_and_names_every_one(backends):
    backends("glfw", glfw=(False, "no display"), egl=(False, "no driver"), osmesa=(False, "no library"))
    found = doctor.graphics()
    assert found.status == FAIL and "glfw: no display; egl: no driver; osmesa: no library" in found.found and "apt install" in found.fix


@pytest.mark.gl
def test_this_machine_draws_a_frame():
    pytest.importorskip("mujoco")
    assert doctor.graphics().status != FAIL, doctor.graphics()


def test_ffmpeg_encodes_or_says_why(monkeypatch, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    assert doctor.ffmpeg().status == OK
    broken = tmp_path / "ffmpeg"
    broken.write_text(f"#!{sys.executable}\nimport sys; sys.stdin.buffer.read(); sys.exit('no encoder libx264')\n")
    broken.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(broken))
    found = doctor.ffmpeg()
    assert found.status == FAIL and "no encoder libx264" in found.found and "IMAGEIO_FFMPEG_EXE" in found.fix


def test_disk_measures_and_reports_a_folder_it_cannot_write(tmp_path):
    fine = doctor.disk(tmp_path, megabytes=1)
    assert "GB free" in fine.found and not list(tmp_path.iterdir())
    gone = doctor.disk(tmp_path / "absent", megabytes=1)
    assert gone.status == FAIL and "absent: No such file" in gone.found


def test_a_full_disk_is_a_finding(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    found = doctor.disk(tmp_path, megabytes=1)
    assert found.status == FAIL and "No space left" in found.found and found.fix


def test_busy_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "cores", lambda: 2.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.9, 0, 0))
    assert doctor.load().status == WARN and "OMP_NUM_THREADS=1" in doctor.load().fix
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    assert doctor.load().status == OK


def test_more_threads_than_cores_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "cores", lambda: 0.5)
    assert doctor.torch().status == WARN and "OMP_NUM_THREADS=1" in doctor.torch().fix


def test_a_dataset_that_does_not_open_fails_with_its_own_advice(tmp_path):
    found = doctor.dataset(str(tmp_path / "nothing.zarr"))
    assert found.status == FAIL and "does not exist" in found.found


def test_a_dataset_that_opens_is_described(tmp_path):
    import numpy as np

    from policy.data.store import Store
    store = Store.create(tmp_path / "d.zarr", {"action": ((2,), np.float32)}, fps=10)
    store.append({"action": np.zeros((7, 2), np.float32)})
    found = doctor.dataset(str(tmp_path / "d.zarr"))
    assert found.status == OK and "1 episodes, 7 steps at 10" in found.found


def test_a_check_that_breaks_is_a_finding_and_the_rest_still_run():
    def sick():
        raise ImportError("libtorch.so: cannot open")

    def well():
        return Finding("well", OK, "yes")
    broken, fine = doctor.examine([sick, well])
    assert broken.status == FAIL and "libtorch.so" in broken.found and broken.fix and fine.status == OK


@pytest.mark.parametrize("status, code", [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_the_exit_code_tells_and_the_table_shows_everything(monkeypatch, capsys, status, code):
    monkeypatch.setattr(doctor, "examine", lambda checks: [Finding("arm", status, "found [red]", "a fix")])
    monkeypatch.setattr(sys, "argv", ["dipole doctor"])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    out = capsys.readouterr().out
    assert stop.value.code == code
    assert all(text in out for text in ("arm", status, "found [red]", "a fix"))


def test_it_speaks_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    doctor.show([Finding("arm", FAIL, "loose", "tighten")])
    assert capsys.readouterr().out == "FAIL  arm: loose -> tighten\n"


def test_help_shows_three_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dipole doctor", "--help"])
    doctor.main()
    assert capsys.readouterr().out.count("\n  dipole doctor") == 3


def test_an_unknown_setting_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dipole doctor", "pth=x"])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 2 and "'pth'" in capsys.readouterr().err


def test_a_robot_with_the_client_alone_is_not_broken(monkeypatch, capsys):
    """No torch, no packaging, no rich: what dipole[client] leaves out is no fault."""
    there = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: there(name) if name in sys.stdlib_module_names else None)
    monkeypatch.setattr(sys, "argv", ["dipole doctor"])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "0 broken" in out and "asks a server for its plans" in out
