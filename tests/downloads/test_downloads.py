"""Downloads from a hub that breaks off, lies and refuses; what is on the disk afterwards."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import threading

import pytest

from modules.downloads import Downloads
from modules.errors import AccessDenied, Busy, DataError, InUse, NameError_, NotFound, SettingsError
from modules.loaders import list_models
from modules.paths import UserData
from tests.fakes import WAIT, until
from tests.hub_server import serving

GGUF = random.Random(1).randbytes(1_500_000)
SMALL = b'{"model_type": "llama"}'


@pytest.fixture
def hub():
    with serving(files={"m.Q4_K_M.gguf": GGUF, "README.md": b"# Hi", ".gitattributes": b"x"}) as made:
        yield made


@pytest.fixture
def data(tmp_path):
    made = UserData(tmp_path / "user_data")
    made.create()
    return made


@pytest.fixture
def downloads(hub, data):
    made = Downloads(data, hub.url, pause=0.001, token="secret-token")
    yield made
    if hub.hold:
        hub.hold.set()
    made.close()


def fetched(downloads, text="some/model", **values):
    asked = {name: values.pop(name) for name in ("branch", "pattern") if name in values}
    return downloads.wait(downloads.start(downloads.plan(text, **asked), **values), WAIT)


def left(data):
    """Everything below the folders of models and adapters."""
    return sorted(path.relative_to(data.root).as_posix() for folder in (data.models, data.loras, data.mmproj) for path in folder.rglob("*"))


def test_a_plan_tells_files_sizes_and_checksums(downloads):
    plan = downloads.plan("some/model")
    assert (plan.repo, plan.branch, plan.kind, plan.chosen) == ("some/model", "main", "gguf", ("m.Q4_K_M.gguf",))
    found = {file.name: file for file in plan.files}
    assert set(found) == {"m.Q4_K_M.gguf", "README.md"} and found["m.Q4_K_M.gguf"].size == len(GGUF)
    assert found["m.Q4_K_M.gguf"].sha256 == hashlib.sha256(GGUF).hexdigest() and found["README.md"].git_sha1


def test_a_file_arrives_whole_and_nothing_else_stays(downloads, data, hub):
    end = fetched(downloads)
    assert (end.state, end.done, end.total, end.targets) == ("done", len(GGUF), len(GGUF), ("m.Q4_K_M.gguf",))
    assert left(data) == ["models/m.Q4_K_M.gguf"] and (data.models / "m.Q4_K_M.gguf").read_bytes() == GGUF
    assert fetched(downloads).state == "done" and len(hub.contents()) == 1  # it was there already


def test_the_token_goes_to_the_endpoint_alone(downloads, hub, caplog):
    hub.token = "secret-token"
    assert fetched(downloads).state == "done"
    assert all("authorization" not in headers for headers in hub.contents()) and hub.contents()
    assert all("secret" not in record.getMessage() for record in caplog.records)


def test_a_connection_that_breaks_three_times_goes_on_where_it_was(downloads, data, hub):
    hub.drops = [300_000, 300_000, 300_000]
    assert fetched(downloads).state == "done"
    assert (data.models / "m.Q4_K_M.gguf").read_bytes() == GGUF
    starts = [int(headers.get("range", "bytes=0-")[6:-1]) for headers in hub.contents()]
    assert starts[0] == 0 and starts == sorted(starts) and len(set(starts)) == 4 and all("if-range" in h for h in hub.contents()[1:])


def test_it_gives_up_after_the_attempts_and_can_be_resumed(downloads, data, hub):
    hub.busy = 8
    end = fetched(downloads)
    assert end.state == "failed" and "503" in end.error and len(hub.contents()) == 8
    downloads.resume(end.id)
    assert downloads.wait(end.id, WAIT).state == "done" and left(data) == ["models/m.Q4_K_M.gguf"]


def test_a_busy_server_is_asked_again(downloads, hub):
    hub.busy = 3
    assert fetched(downloads).state == "done"


def test_a_corrupt_file_is_refused(downloads, data, hub):
    hub.served["m.Q4_K_M.gguf"] = GGUF[:-1] + b"!"
    end = fetched(downloads)
    assert end.state == "failed" and "checksum" in end.error
    assert list_models(data.models) == [] and not list(data.models.rglob("*.gguf")) and not list(data.models.rglob("*.part"))
    hub.served.clear()
    downloads.resume(end.id)
    assert downloads.wait(end.id, WAIT).state == "done"


def test_a_file_of_another_size_is_refused(downloads, hub):
    for wrong in (GGUF + b"more", GGUF[:1000]):
        hub.served["m.Q4_K_M.gguf"] = wrong
        end = fetched(downloads)
        assert end.state == "failed" and "another size" in end.error


@pytest.mark.parametrize("ignored", [False, True])
def test_a_file_changed_on_the_server_begins_anew(downloads, data, hub, ignored):
    """The beginning came from another content of the same size; a server may heed If-Range, or ignore ranges altogether."""
    hub.served["m.Q4_K_M.gguf"] = bytes(len(GGUF))
    hub.drops, hub.hold = [700_000], threading.Event()
    id = downloads.start(downloads.plan("some/model"))
    until(lambda: downloads.get(id).done > 600_000)
    hub.served.clear()
    hub.ignore_range = ignored
    hub.hold.set()
    assert downloads.wait(id, WAIT).state == "done" and (data.models / "m.Q4_K_M.gguf").read_bytes() == GGUF
    assert len(hub.contents()) == 2


def test_a_beginning_that_does_not_fit_is_noticed_by_the_checksum(downloads, data, hub):
    id = downloads.start(paused := downloads.plan("some/model"))
    downloads.pause(id)
    downloads.wait(id, WAIT)
    until(lambda: not downloads._jobs[id].thread)
    part = downloads._jobs[id].fetch.staging / f"{paused.files[0].digest}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"?" * 500_000)
    part.with_suffix(".etag").unlink(missing_ok=True)
    downloads.resume(id)
    assert downloads.wait(id, WAIT).state == "done" and (data.models / "m.Q4_K_M.gguf").read_bytes() == GGUF


def test_a_folder_appears_whole_or_not_at_all(downloads, data, hub):
    hub.files = {"config.json": SMALL, "sub/a.json": SMALL, "model.safetensors": GGUF, "pytorch_model.bin": GGUF, "x.txt": b""}
    hub.hold = threading.Event()
    id = downloads.start(downloads.plan("some/model"))
    until(lambda: downloads.get(id).done > 500_000)
    assert [path.name for path in data.models.iterdir()] == [".downloads"]
    assert not [path for path in data.models.rglob("*") if path.suffix in (".json", ".safetensors")]
    hub.hold.set()
    end = downloads.wait(id, WAIT)
    assert end.state == "done" and end.targets == ("some_model",) and end.done == end.total == len(GGUF) + len(SMALL)
    names = ["", "/config.json", "/model.safetensors", "/sub", "/sub/a.json", "/x.txt"]
    assert left(data) == [f"models/some_model{name}" for name in names]
    assert (data.models / "some_model/sub/a.json").read_bytes() == SMALL and (data.models / "some_model/x.txt").read_bytes() == b""


def test_a_folder_that_lacks_files_is_completed_and_another_one_is_left_alone(downloads, data, hub):
    hub.files = {"config.json": SMALL, "model.safetensors": GGUF, "same.json": SMALL}
    folder = data.models / "some_model"
    folder.mkdir()
    (folder / "config.json").write_bytes(SMALL)
    (folder / "mine.txt").write_bytes(b"mine")
    assert fetched(downloads).state == "done" and len(hub.contents()) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "mine.txt", "model.safetensors", "same.json"]
    assert (folder / "same.json").read_bytes() == SMALL
    (folder / "config.json").write_bytes(b"{}")
    end = fetched(downloads)
    assert end.state == "failed" and "config.json" in end.error and (folder / "config.json").read_bytes() == b"{}"
    assert fetched(downloads, replace=True).state == "done" and (folder / "config.json").read_bytes() == SMALL


def test_parts_of_a_split_model_and_a_branch(downloads, data, hub):
    hub.files = {f"Q4_K_M/m-Q4_K_M-0000{n}-of-00002.gguf": GGUF[n:] for n in (1, 2)} | {"mmproj-F16.gguf": GGUF}
    hub.branches["dev"] = hub.branches["main"]
    plan = downloads.plan("some/model:dev")
    id = downloads.start(plan, [*plan.chosen, "mmproj-F16.gguf"])
    assert downloads.wait(id, WAIT).state == "done"
    assert left(data) == ["mmproj/model-mmproj-F16.gguf", *(f"models/m-Q4_K_M-0000{n}-of-00002.gguf" for n in (1, 2))]
    hub.files = {"config.json": SMALL, "model.safetensors": GGUF}
    assert fetched(downloads, branch="dev").targets == ("some_model_dev",)


def test_adapters_go_to_their_own_folder(downloads, data, hub):
    hub.files = {"adapter_config.json": SMALL, "adapter_model.safetensors": GGUF}
    assert fetched(downloads).state == "done" and (data.loras / "some_model" / "adapter_model.safetensors").read_bytes() == GGUF
    assert not (data.loras / ".downloads").exists()


def test_pause_resume_cancel(downloads, data, hub):
    hub.hold = threading.Event()
    told = []
    downloads.listen(lambda: told.extend(status.state for status in downloads.status()))
    id = downloads.start(downloads.plan("some/model"))
    until(lambda: downloads.get(id).done > 500_000)
    running = downloads.get(id)
    assert running.state == "running" and running.speed > 0 and running.left is not None
    downloads.pause(id)
    until(lambda: not downloads._jobs[id].thread)  # the reader wakes though the server says nothing
    paused = downloads.get(id)
    assert paused.state == "paused" and paused.done > 500_000 and paused.left is None
    hub.hold.set()
    downloads.resume(id)
    assert downloads.wait(id, WAIT).state == "done" and (data.models / "m.Q4_K_M.gguf").read_bytes() == GGUF
    assert int(hub.contents()[1]["range"][6:-1]) >= 500_000
    assert told[0] == "running" and "paused" in told and told[-1] == "done"
    downloads.forget(id)
    assert downloads.status() == ()
    with pytest.raises(NotFound):
        downloads.pause(id)


def test_what_is_cancelled_before_its_thread_has_begun_is_not_fetched(downloads, data, hub, monkeypatch):
    go, run = threading.Event(), Downloads._run

    def late(*given):
        assert go.wait(WAIT)
        run(*given)

    monkeypatch.setattr(Downloads, "_run", late)
    id = downloads.start(downloads.plan("some/model"))
    downloads.cancel(id)
    go.set()
    assert downloads.wait(id, WAIT).state == "cancelled"
    until(lambda: not any(job.thread for job in downloads._jobs.values()))
    assert not [*data.models.rglob("*.gguf")]


def test_cancel_deletes_what_there_is(downloads, data, hub):
    hub.hold = threading.Event()
    id = downloads.start(downloads.plan("some/model"))
    until(lambda: downloads.get(id).done > 500_000)
    with pytest.raises(InUse):
        downloads.forget(id)
    downloads.cancel(id)
    assert downloads.wait(id, WAIT).state == "cancelled"
    until(lambda: left(data) == [])
    downloads.resume(id)
    assert downloads.get(id).state == "cancelled"


def test_a_stop_while_it_waits_for_the_next_attempt(hub, data):
    made = Downloads(data, hub.url, pause=60)
    hub.drops = [0] * 10
    id = made.start(made.plan("some/model"))
    until(lambda: hub.contents())
    made.close()
    assert made.get(id).state == "paused"


def test_so_many_at_once_and_no_more(data, hub):
    hub.files = {f"m{n}.gguf": GGUF[n:] for n in range(20)}
    hub.hold = threading.Event()
    made = Downloads(data, hub.url, at_once=2, pause=0.001)
    ids = [made.start(made.plan("some/model", pattern=f"m{n}.gguf")) for n in range(16)]
    with pytest.raises(Busy, match="16"):
        made.start(made.plan("some/model", pattern="m16.gguf"))
    with pytest.raises(InUse):
        made.cancel(ids.pop()) or made.start(made.plan("some/model", pattern="m0.gguf"))
    until(lambda: len(hub.contents()) == 2)
    assert [made.get(id).state for id in ids[:3]] == ["running", "running", "queued"]
    hub.hold.set()
    assert {made.wait(id, WAIT).state for id in ids} == {"done"}
    assert list_models(data.models) == [f"m{n}.gguf" for n in range(15)]
    made.close()


def test_hostile_names_in_a_listing(downloads, hub, data):
    hub.names = ["../../evil.gguf", "/etc/evil.gguf", "..\\evil.gguf"]
    plan = downloads.plan("some/model")
    assert {file.name for file in plan.files} == {"m.Q4_K_M.gguf", "README.md"}
    for name in hub.names:
        with pytest.raises(NameError_):
            downloads.start(plan, [name])
    hub.files = {"a/m.gguf": GGUF, "b/M.gguf": GGUF}
    with pytest.raises(NameError_, match="same file"):
        downloads.start(downloads.plan("some/model"), ["a/m.gguf", "b/M.gguf"])


def test_a_link_out_of_the_folder_is_no_way_out(downloads, data, hub, tmp_path):
    hub.files = {"config.json": SMALL, "model.safetensors": GGUF}
    (data.models / "some_model").symlink_to(tmp_path)
    with pytest.raises(NameError_, match="leads out"):
        downloads.start(downloads.plan("some/model"))


def test_redirects_to_plain_or_strange_addresses_are_not_followed(downloads, hub):
    for location in ("ftp://localhost/x", "http://example.org/x", "//user:pw@localhost/x"):
        hub.location = location
        end = fetched(downloads)
        assert end.state == "failed" and "Nothing was loaded" in end.error, location
    hub.location = f"{hub.url}/some/model/resolve/{hub.branches['main']}/m.Q4_K_M.gguf"  # to itself
    assert "from address to address" in fetched(downloads).error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ((401, "GatedRepo"), AccessDenied, "Accept its conditions at http"),
        ((403, "GatedRepo"), AccessDenied, "HF_TOKEN"),
        ((401, ""), AccessDenied, "token"),
        ((404, "RepoNotFound"), NotFound, "no repository some/model"),
        ((404, "RevisionNotFound"), NotFound, "no such branch"),
        ((429, ""), Busy, "429"),
        ((418, ""), DataError, "418"),
    ],
)
def test_errors_name_the_fix(downloads, hub, error, kind, words):
    hub.error = error
    with pytest.raises(kind, match=words) as raised:
        downloads.plan("some/model")
    assert "secret-token" not in str(raised.value)


def test_what_is_not_there(downloads, hub, data):
    with pytest.raises(NotFound, match="no repository"):
        downloads.plan("other/model")
    with pytest.raises(NotFound, match="branch"):
        downloads.plan("some/model", branch="nope")
    hub.token = "another"
    with pytest.raises(AccessDenied, match="your token has no access"):
        downloads.plan("some/model")
    with pytest.raises(AccessDenied, match="wants to know who you are"):
        Downloads(data, hub.url, token="").plan("some/model")


def test_nobody_answers(data):
    with serving() as gone:
        url = gone.url
    with pytest.raises(Busy, match="no connection"):
        Downloads(data, url).plan("some/model")
    with pytest.raises(SettingsError, match="https"):
        Downloads(data, "http://example.org").plan("some/model")


def test_a_full_disk_is_told(downloads, data, hub, monkeypatch):
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(data.root)
        patched.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10 << 20))
        end = fetched(downloads)
        assert end.state == "failed" and "10 MiB are free" in end.error and not hub.contents()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:  # systems that write late tell it there
        patched.setattr(os, "fsync", full)
        downloads.resume(end.id)
        end = downloads.wait(end.id, WAIT)
    assert end.state == "failed" and os.strerror(errno.ENOSPC) in end.error and "Free some space" in end.error
    assert list_models(data.models) == []
    downloads.resume(end.id)
    assert downloads.wait(end.id, WAIT).state == "done"


def test_two_programs_do_not_write_the_same_files(hub, data):
    hub.hold = threading.Event()
    first, second = (Downloads(data, hub.url, pause=0.001) for _ in range(2))
    id = first.start(first.plan("some/model"))
    until(lambda: first.get(id).done > 500_000)
    assert "Another download" in fetched(second).error
    hub.hold.set()
    assert first.wait(id, WAIT).state == "done"
    second.close()
    first.close()


def test_check_finds_what_is_missing_or_damaged(downloads, data, hub):
    hub.files = {"config.json": SMALL, "model.safetensors": GGUF}
    plan = downloads.plan("some/model")
    assert set(downloads.check(plan)) == {"config.json", "model.safetensors"}
    assert fetched(downloads).state == "done" and downloads.check(plan) == []
    (data.models / "some_model/config.json").write_bytes(SMALL[:-1] + b"]")
    assert downloads.check(plan) == ["config.json"]


def test_what_was_left_long_ago_goes(downloads, data, hub):
    old = data.models / ".downloads" / "old"
    old.mkdir(parents=True)
    (old / "x.part").write_bytes(b"x")
    for path in (old / "x.part", old):
        os.utime(path, (1, 1))
    assert fetched(downloads).state == "done" and left(data) == ["models/m.Q4_K_M.gguf"]
