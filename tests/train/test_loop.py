"""Training: exact resume, interruption, NaN, a full disk, and its parts against diffusers."""
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from policy.train import checkpoint
from policy.train.ema import Ema, decay_at
from policy.train.log import Log, read_rows
from policy.train.loop import NotFinite, Settings, Trainer, lr_scale
from tests.helpers import CONFIG, make_data, make_planner, make_store

SMALL = {"steps": 20, "batch": 16, "warmup": 3, "log": 5, "save": 10, "precision": "fp32"}


def trainer(folder: Path, store, **settings) -> Trainer:
    data = make_data(store)
    return Trainer(make_planner(data), data, folder, Settings(**{**SMALL, **settings}), config=CONFIG, val=make_data(store, "val"))


def run(t: Trainer, **options) -> None:
    t.folder.mkdir(parents=True, exist_ok=True)
    with Log(t.folder, wandb="disabled", **options) as log:
        t.run(log)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / "checkpoints" / "last.safetensors")[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(tmp_path, precision):
    """10 steps, a new process' worth of state, 10 more = 20 steps: every weight, average and optimiser moment, bit for bit."""
    store = make_store(tmp_path / "d.zarr")
    whole = trainer(tmp_path / "whole", store, precision=precision)
    run(whole)
    half = trainer(tmp_path / "half", store, precision=precision)
    half._run(Log(tmp_path, wandb="disabled"), lambda note: setattr(half, "_stop", half.step >= 10))
    assert half.step == 10
    torch.manual_seed(123)  # whatever happened in between
    torch.rand(7)
    rest = trainer(tmp_path / "half", store, precision=precision)
    rest.resume()
    run(rest, resume_at=rest.step)
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    assert a.keys() == b.keys() and len(a) > 100
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["model/denoiser.net.out.1.weight"], make_planner(make_data(store)).denoiser.net.out[1].weight)


def test_resume_refuses_another_dataset_and_warns_of_other_settings(tmp_path, capsys):
    run(trainer(tmp_path / "r", make_store(tmp_path / "a.zarr")))
    with pytest.raises(ValueError, match=r"100 windows.*125"):
        trainer(tmp_path / "r", make_store(tmp_path / "b.zarr", steps=25)).resume()
    trainer(tmp_path / "r", make_store(tmp_path / "c.zarr"), lr=1e-3).resume()
    assert "but not bit for bit" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys):
    t = trainer(tmp_path / "r", make_store(tmp_path / "d.zarr"), steps=100_000, save=0)
    threading.Thread(target=lambda: (time.sleep(1), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    run(t)
    assert 0 < t.step < 100_000
    assert checkpoint.read(tmp_path / "r" / "checkpoints" / "last.safetensors")[1]["step"] == t.step
    assert "resume=true" in capsys.readouterr().out.replace("\n", " ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path, kills):
    """SIGKILL while saving as often as possible; the last checkpoint always opens."""
    script = textwrap.dedent("""
        import sys, torch; from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from tests.train.test_loop import trainer, run; from policy.data.store import Store
        torch.set_num_threads(1)
        t = trainer(Path(sys.argv[2]), Store.open(sys.argv[3]), steps=100000, save=1, log=100000); print("ready", flush=True); run(t)""")
    make_store(tmp_path / "d.zarr")
    root = str(Path(__file__).parents[2])
    for i in range(kills):
        p = subprocess.Popen([sys.executable, "-c", script, root, str(tmp_path / "r"), str(tmp_path / "d.zarr")], stdout=subprocess.PIPE)
        assert p.stdout is not None
        p.stdout.readline()
        time.sleep(1.0 + 0.137 * i)
        p.kill()
        p.wait()
        _, facts = checkpoint.read(tmp_path / "r" / "checkpoints" / "last.safetensors")
        assert facts["step"] > 0
        checkpoint.load(tmp_path / "r")


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path):
    t = trainer(tmp_path / "r", make_store(tmp_path / "d.zarr"))
    run(t)
    path = tmp_path / "r" / "checkpoints" / "last.safetensors"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # writes fail as on a full disk
    try:
        with pytest.raises(OSError, match=r"last.safetensors is intact.*Free some disk space.*resume=true"):
            t.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and not list(path.parent.glob("*.part"))
    trainer(tmp_path / "r", make_store(tmp_path / "e.zarr")).resume()


def test_a_loss_that_is_not_finite_stops_with_its_batch(tmp_path):
    t = trainer(tmp_path / "r", make_store(tmp_path / "d.zarr"), log=1000, save=5)
    honest = t.planner.loss
    t.loss_fn = lambda batch, progress: honest(batch, progress) * (float("nan") if t.step == 12 else 1.0)
    with pytest.raises(NotFinite, match=r"step 12.*not_finite_step_12.*train.lr"):
        run(t)
    from safetensors.torch import load_file
    kept = load_file(tmp_path / "r" / "not_finite_step_12.safetensors")
    want = t.batch(12)
    assert torch.equal(kept["action"], want.action) and torch.equal(kept["obs/x"], want.obs["x"])
    tensors_, facts = checkpoint.read(tmp_path / "r" / "checkpoints" / "last.safetensors")
    assert facts["step"] == 10 and all(v.isfinite().all() for v in tensors_.values())


def test_training_learns_and_logs(tmp_path):
    t = trainer(tmp_path / "r", make_store(tmp_path / "d.zarr"), steps=300, log=50, lr=1e-2, eval=150)
    run(t)
    rows = read_rows(tmp_path / "r" / "train.jsonl")
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < 0.8 * losses[0]
    assert [r["step"] for r in rows if "val_loss" in r] == [150, 300]
    assert {"lr", "samples_per_s", "data_wait", "cpu_s", "wall_s"} <= rows[0].keys() and 0 <= rows[0]["data_wait"] < 0.5
    _, facts = checkpoint.load(tmp_path / "r", "policy_150")
    assert facts["step"] == 150 and "torch" in facts["versions"]
    with pytest.raises(FileNotFoundError, match=r"there are last, policy, policy_150, policy_300"):
        checkpoint.load(tmp_path / "r", "best")


def test_every_window_is_seen_once_an_epoch_in_an_order_of_its_own(tmp_path):
    t = trainer(tmp_path / "r", make_store(tmp_path / "d.zarr"))
    epochs = [torch.cat([t.batch(e * 6 + i).action[:, 0] for i in range(6)]) for e in range(2)]
    want = t.data.arrays["action"]
    for seen in epochs:  # 6 x 16 of 100 windows, none twice
        assert len(seen) == 96 == len(seen.unique(dim=0)) and torch.isin(seen, want).all()
    assert not torch.equal(*epochs)


def test_averaging_is_diffusers(tmp_path):
    from diffusers.training_utils import EMAModel
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    ours, theirs = Ema(net, limit=0.99, power=0.75), EMAModel(net.parameters(), decay=0.99, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    for step in range(300):
        with torch.no_grad():
            net.weight.add_(torch.randn(4, 4))
        ours.update(step)
        theirs.step(net.parameters())
    torch.testing.assert_close(ours.average["weight"], theirs.shadow_params[0], rtol=1e-4, atol=1e-4)
    assert decay_at(0, limit=0.99) == 0
    live = net.weight.clone()
    with ours.applied():
        torch.testing.assert_close(net.weight, theirs.shadow_params[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(net.weight, live)


def test_the_learning_rate_is_diffusers_cosine():
    from diffusers.optimization import get_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs, s = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=100), Settings(steps=100, warmup=10)
    for step in range(100):
        assert lr_scale(step, s) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_wandb_keeps_curves_offline(tmp_path):
    with Log(tmp_path, wandb="offline", config={"a": 1}) as log:
        log.row(1, loss=0.5, eval={"success": 1.0})
        log.row(2, loss=0.25)
    file, = tmp_path.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while b"eval/success" not in file.read_bytes() and time.monotonic() < deadline:  # its writer is another process
        time.sleep(0.1)
    assert b"eval/success" in file.read_bytes()


def test_log_drops_rows_that_are_about_to_be_repeated_and_torn_lines(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"ste')
    with Log(tmp_path, wandb="disabled", resume_at=10) as log:
        log.row(12, loss=1.0)
    assert [r["step"] for r in read_rows(tmp_path / "train.jsonl")] == [5, 10, 12]
