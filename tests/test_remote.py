"""Copies of checkpoints in remote stores: folders, memory, and a server over real sockets."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from ftp_server import FtpStore, serve
from ranks import run_ranks
from tiny_runs import read_losses, read_samples, tiny_config, train_rank

from data.retry import Retry
from trainer.checkpoint import (
    MANIFEST,
    CheckpointError,
    TrainState,
    check,
    find_checkpoint,
    find_newest,
    list_steps,
    load_state,
    load_weights,
)
from trainer.config import ConfigError
from trainer.events import read_events
from trainer.export.formats import export_checkpoint
from trainer.export.onnx_file import OnnxOptions
from trainer.ranks import Ranks
from trainer.remote import Remote, RemoteError, Uploader, url_of
from trainer.run import check_config, check_new, remote_of
from trainer.saving import CheckpointFolder

QUICK = Retry(attempts=3, first_wait_s=0.01, max_wait_s=0.02)


@pytest.fixture
def store(tmp_path):
    with serve(tmp_path / "store") as running:
        yield running


def open_run(run: Path, url: str, keep_last: int = 2, **options) -> CheckpointFolder:
    remote = Remote(url, QUICK)
    saver = CheckpointFolder(
        run / "checkpoints", Ranks(), keep_last=keep_last, remote=remote, **options
    )
    saver._uploader._pause_s = 0.05
    return saver


def save(saver: CheckpointFolder, step: int, numel: int = 1000) -> None:
    state = TrainState(fingerprint="f", world_size=1, zero_stage=0, step=step)
    saver.save(state, "", {"deepspeed/x.pt": {"w": torch.full((numel,), float(step))}})


def events(run: Path, name: str) -> list[int]:
    return [event["step"] for event in read_events(run) if event["event"] == name]


def urls(tmp_path: Path, store: FtpStore) -> dict[str, str]:
    return {
        "folder": str(tmp_path / "copies"),
        "file": f"file://{tmp_path}/copies",
        "memory": f"memory://{tmp_path.name}/copies",
        "ftp": store.url("bucket/run"),
    }


@pytest.mark.parametrize("kind", ["folder", "file", "memory", "ftp"])
def test_whole_checkpoints_go_there_and_come_back(tmp_path, store, kind):
    url = urls(tmp_path, store)[kind]
    run = tmp_path / "run"
    saver = open_run(run, url)
    for step in range(1, 6):
        save(saver, step)
        saver.wait()
    assert Remote(url).steps() == [4, 5] == list_steps(run / "checkpoints")
    assert events(run, "uploaded") == [1, 2, 3, 4, 5]
    before = (run / "checkpoints" / "step-00000005" / "deepspeed" / "x.pt").read_bytes()
    shutil.rmtree(run)
    found = open_run(run, url).newest()
    assert found == run / "checkpoints" / "step-00000005" and not check(found)
    assert (found / "deepspeed" / "x.pt").read_bytes() == before
    assert list_steps(run / "checkpoints") == [5] and not list(found.parent.glob(".*"))


def test_the_manifest_is_the_last_file_there_and_the_first_to_go(tmp_path, store):
    saver = open_run(tmp_path / "run", store.url("r"), keep_last=1)
    for step in (1, 2):
        save(saver, step)
        saver.wait()
    stored = [line.split("/")[-1] for line in store.asked if line.startswith("STOR")]
    assert stored[3] == stored[7] == MANIFEST and len(stored) == 8
    gone = [line.split("/")[-1] for line in store.asked if line.startswith("DELE")]
    assert gone[0] == MANIFEST and len(gone) == 4


def test_an_upload_that_is_cut_off_is_tried_again_and_no_torso_is_taken(tmp_path, store, caplog):
    run = tmp_path / "run"
    saver = open_run(run, store.url("r"))
    save(saver, 1)
    saver.wait()
    store.num_cuts = 2
    save(saver, 2)
    saver.wait()
    assert "trying again" in caplog.text and events(run, "uploaded") == [1, 2]
    (store.root / "r" / "step-00000002" / MANIFEST).unlink()  # where an upload was cut for good
    shutil.rmtree(run)
    with caplog.at_level(logging.WARNING, logger="nsphere.checkpoint"):
        assert open_run(run, store.url("r")).newest() == run / "checkpoints" / "step-00000001"
    assert "skipping remote checkpoint" in caplog.text
    assert "step-00000002: no manifest.json: it was never finished" in caplog.text


def test_a_store_that_is_down_never_stops_training(tmp_path, store, caplog):
    run = tmp_path / "run"
    saver = open_run(run, store.url("r"))
    save(saver, 1)
    saver.wait()
    store.down = True
    started = time.monotonic()
    for step in (2, 3, 4):
        save(saver, step)
    assert time.monotonic() - started < 30
    while not events(run, "upload_refused"):
        time.sleep(0.01)
    store.down = False
    saver.wait()
    assert "which has older ones at most" in caplog.text and "training goes on" in caplog.text
    assert events(run, "uploaded")[-1] == 4, "the newest wins"
    assert Remote(store.url("r")).steps()[-1] == 4
    store.down = True
    save(saver, 5)
    saver.wait()  # gives up, says so, and the run ends well
    assert find_newest(run / "checkpoints").name == "step-00000005"
    assert events(run, "upload_refused")[-1] == 5 and events(run, "uploaded")[-1] == 4


def test_one_at_a_time_and_the_newest_wins(tmp_path, store):
    """What falls behind is let go; what is on its way is not pruned under the uploader's hands."""
    store.slow_s = 0.15
    run = tmp_path / "run"
    saver = open_run(run, store.url("r"), keep_last=1)
    for step in range(1, 9):
        save(saver, step)
        time.sleep(0.05)
    saver.wait()
    uploaded = events(run, "uploaded")
    assert uploaded[-1] == 8 and len(uploaded) < 8 and not events(run, "upload_refused")
    assert list_steps(run / "checkpoints")[-1] == 8
    assert Remote(store.url("r")).steps() == [8]


def test_pruning_never_takes_the_last_whole_one(tmp_path, store):
    remote = Remote(store.url("r"), QUICK)
    saver = open_run(tmp_path / "run", store.url("r"), keep_last=9)
    for step in (2, 4, 6):
        save(saver, step)
        saver.wait()
    for step in (4, 6):
        (store.root / "r" / f"step-{step:08d}" / MANIFEST).write_text("{")
    remote.prune(1, 0, newest=6)
    assert remote.steps() == [2], "torsos go, the last whole one stays"
    (store.root / "r" / "step-00000002" / MANIFEST).unlink()
    remote.prune(1, 0, newest=6)
    assert remote.steps() == [2]


def test_what_changed_in_the_store_is_not_taken(tmp_path, caplog):
    url = str(tmp_path / "copies")
    saver = open_run(tmp_path / "run", url)
    for step in (1, 2):
        save(saver, step)
        saver.wait()
    part = tmp_path / "copies" / "step-00000002" / "deepspeed" / "x.pt"
    content = bytearray(part.read_bytes())
    content[50] ^= 1
    part.write_bytes(content)
    shutil.rmtree(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="nsphere.checkpoint"):
        found = open_run(tmp_path / "run", url).newest()
    assert found is not None and found.name == "step-00000001"
    assert "x.pt does not match its checksum" in caplog.text


def test_what_the_run_went_back_from_is_forgotten_there_too(tmp_path, store):
    saver = open_run(tmp_path / "run", store.url("r"), keep_last=9)
    for step in (2, 4, 6):
        save(saver, step)
        saver.wait()
    saver.forget_after(2)
    saver.wait()
    assert Remote(store.url("r")).steps() == [2] == list_steps(tmp_path / "run" / "checkpoints")


def test_a_store_that_cannot_be_asked_is_no_empty_store(tmp_path, store, caplog):
    """Beginning anew beside a day's work would be worse than not beginning."""
    url = store.url("r")
    saver = open_run(tmp_path / "run", url)
    save(saver, 3)
    saver.wait()
    store.down = True
    found = open_run(tmp_path / "run", url).newest()
    assert found is not None and "cannot be asked for a newer checkpoint" in caplog.text
    with pytest.raises(CheckpointError, match="start again when it answers, or with --checkpoint"):
        open_run(tmp_path / "other", url).newest()


def test_never_resume_refuses_a_store_with_a_run_in_it(tmp_path):
    url = str(tmp_path / "copies")
    saver = open_run(tmp_path / "run", url)
    save(saver, 3)
    saver.wait()
    with pytest.raises(ConfigError, match="holds a run already and --resume=never was given"):
        open_run(tmp_path / "other", url).newest(resume=False)
    with pytest.raises(ConfigError, match="holds a run already and --resume=never was given"):
        check_new(tmp_path / "other", tiny_config(tmp_path, checkpoint={"remote": url}))


def test_never_resume_asks_a_store_that_is_down_once_and_says_so(tmp_path, store):
    store.down = True
    config = tiny_config(tmp_path, checkpoint={"remote": store.url("r")})
    with pytest.raises(ConfigError, match=r"cannot be asked .*: start again when it answers"):
        check_new(tmp_path / "run", config)


def test_bad_urls_and_missing_drivers_are_told_at_the_start(tmp_path):
    for url, said in {
        "s3://bucket/run": "Install s3fs",
        "memory://": "names no folder",
        "ftp:/bucket/run": "names no folder",
        "nope://x/y": "Protocol not known: nope",
        "sftp://host/x": "paramiko",
        str(tmp_path / "run" / "checkpoints"): "run's own checkpoints folder",
    }.items():
        config = tiny_config(tmp_path, checkpoint={"remote": url})
        with pytest.raises(ConfigError) as told:
            check_config(tmp_path / "run", config, resume=True)
        assert "checkpoint.remote" in str(told.value) and said in str(told.value), url
    assert remote_of(tiny_config(tmp_path), tmp_path / "run") is None


def die_when_copied(group, config, run: str, first: str) -> bool:
    """Train, and die by SIGKILL after step 6 as soon as the first copy is whole."""
    from trainer.train import train

    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == 6:
            while not Path(first).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    ranks = Ranks(group, group.rank(), group.size(), group.rank())
    return train(config, Path(run), ranks, stop=stop)


def test_a_run_goes_on_from_the_store_alone(tmp_path):
    """The whole run folder is lost; losses are those of the run that was never stopped."""
    url = f"file://{tmp_path}/copies"  # fsspec's ftp sends 64 KiB at a time
    config = tiny_config(tmp_path, checkpoint={"remote": url})
    later = tiny_config(tmp_path, checkpoint={"remote": url, "background": True})
    whole = tiny_config(tmp_path)
    run_ranks(2, train_rank, whole, str(tmp_path / "whole"))
    first = tmp_path / "copies" / "step-00000004" / MANIFEST
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(2, die_when_copied, config, str(tmp_path / "run"), str(first))
    kept = [step for step in Remote(url).steps() if Remote(url).manifest(step)]
    assert kept and kept[-1] in (4, 8)
    shutil.rmtree(tmp_path / "run")
    assert run_ranks(2, train_rank, later, str(tmp_path / "run")) == [True, True]
    losses, expected = read_losses(tmp_path / "run"), read_losses(tmp_path / "whole")
    assert losses == {step: expected[step] for step in range(kept[-1] + 1, 13)}
    samples = read_samples(tmp_path / "whole")
    assert all(samples[step] == keys for step, keys in read_samples(tmp_path / "run").items())
    assert Remote(url).steps()[-1] == 12, "the end waits for the last copy"
    other = tiny_config(tmp_path, checkpoint={"remote": url}, optim={"lr": 0.5})
    with pytest.raises(
        AssertionError, match=r"belongs to a run of another configuration \(optim.lr"
    ):
        run_ranks(1, train_rank, other, str(tmp_path / "other"))


def test_eval_and_export_take_a_url(tmp_path, store, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/copies"
    config = tiny_config(tmp_path, checkpoint={"remote": url}, train={"duration": "4 steps"})
    run_ranks(1, train_rank, config, str(tmp_path / "run"))
    out = tmp_path / "weights.safetensors"
    export_checkpoint(Path(url), out, "safetensors", OnnxOptions(), ema=True)
    assert out.is_file()
    path = find_checkpoint(Path(url))  # as the command line has it: pathlib folds slashes
    assert path.is_relative_to(tmp_path / "cache") and load_state(path).step == 4
    local = tmp_path / "run" / "checkpoints" / path.name
    assert load_weights(path).keys() == load_weights(local).keys()
    fetched = path.stat().st_ino
    assert find_checkpoint(Path(f"{url}/step-00000004")) == path
    assert path.stat().st_ino == fetched, "fetched once"
    for bad, said in (("bucket/none", "no whole checkpoint there"), ("", "names no folder")):
        with pytest.raises(CheckpointError, match=said):
            find_checkpoint(Path(store.url(bad)))
    store.down = True
    monkeypatch.setattr("trainer.remote.Retry", lambda **_: QUICK)
    with pytest.raises(CheckpointError, match="gave up after 3 tries"):
        find_checkpoint(Path(store.url("bucket/run")))


def test_urls_that_a_shell_gave_as_paths():
    assert url_of(Path("s3://bucket/run/")) == "s3://bucket/run"
    assert url_of(Path("file:///data/run")) == "file:///data/run"
    assert url_of(Path("runs/clip")) == "" and url_of(Path("/runs/a:b")) == ""


def test_an_uploader_does_not_keep_a_process_alive(tmp_path, store):
    """Its thread is a daemon, and one that is stuck is given up at the end."""
    uploader = Uploader(Remote(store.url("r"), QUICK), tmp_path, 1, 0, pause_s=600)
    store.down = True
    saver = CheckpointFolder(tmp_path / "checkpoints", Ranks(), keep_last=1)
    save(saver, 1)
    uploader.submit(tmp_path / "checkpoints" / "step-00000001")
    while not events(tmp_path, "upload_refused"):
        time.sleep(0.01)
    assert not uploader.is_idle() and all(
        thread.daemon for thread in threading.enumerate() if thread.name == "nsphere-upload"
    )
    uploader.finish()
    until = time.monotonic() + 20
    while not uploader.is_idle():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(RemoteError, match="gave up after 3 tries"):
        Remote(store.url("r"), QUICK).steps()
    assert json.loads((tmp_path / "checkpoints/step-00000001" / MANIFEST).read_text())
