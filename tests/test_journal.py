"""The state file's content, its I/O and its keeper; no cluster."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from distributed import Scheduler

from daskserve.controller.actions import Settle, StartReplica
from daskserve.controller.journal import (
    Journal,
    UnreadableStateError,
    decode,
    encode,
)
from daskserve.controller.keeper import StateKeeper
from daskserve.controller.plugin import NAME, ServeController
from daskserve.controller.records import Spec
from daskserve.controller.state_file import open_state_file
from tests.test_state import Rig, started
from tests.utils import run_script

HTTP = {"options": b"\x80pickled", "enabled": True, "host": "::1", "port": 8000}


def journal(rig: Rig | None = None) -> Journal:
    if rig is None:
        rig = Rig()
        rig.healthy()
    return Journal(http=HTTP, deployments=rig.state.saved())


def restored(rig: Rig) -> Rig:
    """Return what a new scheduler makes of it; no worker is there yet."""
    found = decode(encode(journal(rig), 0), 0)
    assert found == journal(rig)
    new = Rig(0, first_id=1000)
    new.state.restore(found.deployments, now=new.now)
    return new


def join(rig: Rig) -> list[int]:
    """Let workers come; return the replicas that start."""
    for worker in Rig().views.values():
        rig.join(worker)
    return started(rig.reconcile())


# The bytes


def test_it_comes_back() -> None:
    rig = Rig()
    rig.healthy(resources={"CPU": 0.0}, workers=("w1", "w2"), user_config=b"{}")
    rig.healthy(name="g", route_prefix=None, request_timeout_s=1.5)
    there = journal(rig)
    data = encode(there, 100.0)
    assert decode(data, 100.0) == there
    later = decode(data, 40.0)
    assert later is not None
    assert later.deployments[0].versions[0].at == rig.now + 60
    assert decode(encode(None, 0), 0) is None


def test_it_was_written_when_there_were_fewer_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.healthy()
    there = journal(rig)
    plain = Spec.to_message

    def before(spec: Spec) -> dict[str, Any]:
        message = plain(spec)
        for new in ("threads", "abandoned_call_timeout_s", "python"):
            del message[new]
        return message

    monkeypatch.setattr(Spec, "to_message", before)
    assert decode(encode(there, 0), 0) == there


def test_code_of_another_python_is_not_brought_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.healthy()
    plain = Spec.to_message
    other = {"python": "3.99"}
    monkeypatch.setattr(Spec, "to_message", lambda spec: {**plain(spec), **other})
    data = encode(journal(rig), 0)
    with pytest.raises(UnreadableStateError, match="comes from Python 3.99"):
        decode(data, 0)


def test_equal_bytes_are_written_once() -> None:
    rig = Rig()
    for version in "1234":
        rig.healthy(version=version, code=bytes(100_000))
    rig.healthy(name="g", route_prefix="/g", code=bytes(100_000))
    data = encode(journal(rig), 0)
    assert len(data) < 110_000
    found = decode(data, 0)
    assert found is not None
    specs = [v.spec for d in found.deployments for v in d.versions]
    assert len({id(spec.code) for spec in specs}) == 1


def test_any_damage_is_found() -> None:
    data = encode(journal(), 0)
    for length in range(len(data)):
        with pytest.raises(UnreadableStateError):
            decode(data[:length], 0)
    for position in random.Random(1).sample(range(len(data)), 300):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(UnreadableStateError):
            decode(bytes(damaged), 0)


def test_later_format() -> None:
    data = encode(journal(), 0).replace(b"state 1 ", b"state 2 ", 1)
    with pytest.raises(UnreadableStateError, match="another daskserve .format 2"):
        decode(data, 0)


# What a new scheduler makes of it


def test_what_served_is_started_again() -> None:
    rig = Rig()
    rig.healthy()
    new = restored(rig)
    assert new.reconcile() == []
    assert new.routes == {"/f": "f"}  # requests wait
    assert new.entry()["hopeless"] is False
    assert new.status()["state"] == "UNHEALTHY"
    new.wait(1e6)
    ids = join(new)
    assert len(ids) == 2
    new.start(*ids)
    assert new.status()["state"] == "HEALTHY"
    assert new.routed() == ids
    assert new.state.history("f", now=new.now)[0]["version"] == "1"


def test_what_was_on_its_way_goes_on_beside_it() -> None:
    rig = Rig()
    rig.healthy()
    rig.deploy(version="2", code=b"new")
    new = restored(rig)
    new.wait(1e6)
    for worker in Rig().views.values():
        new.join(worker)
    actions = new.reconcile()
    by_code: dict[bytes, list[int]] = {}
    for a in actions:
        assert isinstance(a, StartReplica)
        by_code.setdefault(a.spec.code, []).append(a.replica_id)
    assert {code: len(ids) for code, ids in by_code.items()} == {b"code": 2, b"new": 2}
    new.start(*by_code[b"code"])
    assert new.routed() == by_code[b"code"]
    new.start(*by_code[b"new"])
    assert new.routed() == by_code[b"new"]
    assert new.state.spec("f").version == "2"


def test_a_first_deploy_on_its_way_has_its_time_again() -> None:
    rig = Rig()
    rig.deploy()
    new = restored(rig)
    new.wait(1e6)
    assert new.status()["state"] == "UPDATING"
    assert join(new)
    new.wait(299)
    assert new.status()["state"] == "UPDATING"
    new.wait(2)
    assert "after 300 s" in new.status()["reason"]


def test_what_had_failed_is_as_before() -> None:
    rig = Rig()
    rig.healthy()
    rig.deploy(version="2", num_replicas=1)
    for _ in range(3):
        rig.fail(*started(rig.wait(10)))
    rig.deploy(name="g", route_prefix="/g", num_replicas=1)
    for _ in range(3):
        rig.fail(*started(rig.wait(10)))
    new = restored(rig)
    for name in "fg":
        assert new.status(name)["state"] == "DEPLOY_FAILED"
        assert new.status(name)["reason"] == rig.status(name)["reason"]
    new.start(*join(new))
    assert len(new.routed("f")) == 2
    assert new.entry("g")["hopeless"] is True
    # Another try, as ever.
    ticket = new.deploy(version="2", num_replicas=1)
    assert Settle(ticket) in new.start(*started(new.reconcile()))


def test_other_options_on_their_way() -> None:
    rig = Rig()
    rig.healthy()
    rig.deploy(num_replicas=3)
    new = restored(rig)
    ids = join(new)
    assert len(ids) == 3
    new.start(*ids)
    assert new.state.spec("f").num_replicas == 3
    assert new.status()["state"] == "HEALTHY"


# The file


@pytest.fixture(params=["path", "url"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "path":
        return str(tmp_path / "state")
    return f"memory://{tmp_path.name}/state"


def test_files(where: str) -> None:
    file = open_state_file(where)
    assert file.name == where
    assert file.read() is None
    file.probe()
    assert file.read() is None
    for data in (b"one" * 1000, b"two"):
        file.write(data)
        assert file.read() == data
    other = file.set_aside()
    assert file.read() is None
    fs, _ = fsspec.core.url_to_fs(where)
    assert fs.cat_file(other) == b"two"


def test_local_file(tmp_path: Path) -> None:
    mask = os.umask(0)
    target = tmp_path / "target"
    link = tmp_path / "link"
    link.symlink_to(target)
    try:
        for where in (str(link), f"file://{link}"):
            open_state_file(where).write(b"x")
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [link, target]
    with pytest.raises(OSError, match="No such file"):
        open_state_file(str(tmp_path / "no" / "state")).probe()


def test_full_disk(tmp_path: Path) -> None:
    file = open_state_file(str(tmp_path / "state"))
    file.write(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert file.read() == b"before"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        file = open_state_file(str(tmp_path / name))
        for call in (file.probe, lambda f=file: f.write(b"x")):
            with pytest.raises(OSError, match="Not a regular file"):
                call()
    assert not (tmp_path / "fifo").is_file()


def test_what_others_may_write(tmp_path: Path) -> None:
    """Whoever writes it runs code."""
    folder = tmp_path / "folder"
    folder.mkdir(0o700)
    file = open_state_file(str(folder / "state"))
    file.write(b"x")
    calls = (file.probe, file.read, file.lock, lambda: file.write(b"y"))
    for path, modes in ((folder, (0o777, 0o770)), (folder / "state", (0o666, 0o620))):
        safe = stat.S_IMODE(path.stat().st_mode)
        for mode in modes:
            path.chmod(mode)
            for call in calls:
                with pytest.raises(PermissionError, match=f"go-w {path}"):
                    call()
        path.chmod(safe)
    folder.chmod(0o1777)  # as /tmp
    assert file.read() == b"x"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of another user")
def test_what_belongs_to_others(tmp_path: Path) -> None:
    folder, theirs = tmp_path / "folder", 12345
    folder.mkdir()
    file = open_state_file(str(folder / "state"))
    file.write(b"x")
    for path in (folder, folder / "state"):
        os.chown(path, theirs, -1)
        for call in (file.probe, file.read, file.lock, lambda: file.write(b"y")):
            with pytest.raises(PermissionError, match=f"{path} belongs to another"):
                call()
        os.chown(path, 0, -1)
    far = tmp_path / "far"
    for link, target in (("link", folder / "state"), ("linked", folder)):
        (tmp_path / link).symlink_to(target)
        os.chown(tmp_path / link, theirs, -1, follow_symlinks=False)
    far.symlink_to("./linked/../link")  # by way of one of theirs
    for where in ("link", "linked/state", "far"):
        planted = open_state_file(str(tmp_path / where))
        for call in (planted.probe, planted.read, planted.lock):
            with pytest.raises(PermissionError, match="link .* belongs to another"):
                call()
    # A lock that somebody else has put there.
    (folder / "state.lock").touch()
    os.chown(folder / "state.lock", theirs, -1)
    with pytest.raises(PermissionError, match="state.lock belongs"):
        file.lock()


def test_one_scheduler_at_a_time(tmp_path: Path) -> None:
    where = str(tmp_path / "state")
    script = f"""if True:
        from daskserve.controller.state_file import open_state_file
        file = open_state_file({where!r})
        try:
            file.lock()
        except BlockingIOError as err:
            print(err.strerror)
        else:
            print("free")
    """

    def other() -> str:
        return run_script(script).stdout

    file, second = open_state_file(where), open_state_file(f"local://{where}")
    file.lock()
    file.lock()  # it is ours
    file.write(b"x")  # which renames
    assert f"in use by another scheduler (process {os.getpid()} on " in other()
    assert stat.S_IMODE((tmp_path / "state.lock").stat().st_mode) == 0o600

    async def check() -> None:
        keeper = StateKeeper(second)
        assert await keeper.load() is None
        assert "in use by another scheduler (this process)" in keeper.reason
        keeper.save(journal())
        await keeper.saved()
        await keeper.close()

    run(check)
    assert "in use" in other()
    assert file.read() == b"x"
    child = os.fork()
    if child == 0:
        signal.pause()
    file.unlock()
    try:
        assert other() == "free\n"
        second.lock()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        second.unlock()


# The keeper


class Flaky:
    """A state file that fails, or takes its time, when told to."""

    name = "flaky"

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.writes: list[bytes] = []
        self.content: bytes | None = None

    def lock(self) -> None:
        pass

    unlock = lock

    def read(self) -> bytes | None:
        if self.error:
            raise self.error
        return self.content

    def write(self, data: bytes) -> None:
        if self.error:
            raise self.error
        self.writes.append(data)
        self.content = data

    def set_aside(self) -> str:
        if self.error:
            raise self.error
        return "aside"

    def probe(self) -> None:
        if self.error:
            raise self.error


def run(function: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await function()

    asyncio.run(limited())


def names(found: Journal | None) -> list[str]:
    assert found is not None
    return [f"{d.name} {d.target and d.target.num_replicas}" for d in found.deployments]


def test_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daskserve.controller.keeper.RETRY_S", 0.05)
    file = Flaky()
    rig = Rig()
    rig.healthy()

    async def check() -> None:
        keeper = StateKeeper(file)
        assert await keeper.load() is None
        keeper.save(journal(rig))
        await keeper.saved()
        keeper.save(journal(rig))
        await keeper.saved()
        assert len(file.writes) == 1  # nothing had changed
        for number in range(50):
            rig.deploy(num_replicas=number)
            keeper.save(journal(rig))
        await keeper.saved()
        assert len(file.writes) < 5  # many at once
        assert names(await StateKeeper(file).load()) == ["f 49"]
        file.error = OSError(28, "No space left on device", "temporary")
        rig.deploy(num_replicas=7)
        keeper.save(journal(rig))
        await keeper.saved()
        assert "No space left" in keeper.reason
        file.error = None
        while keeper.reason:
            await asyncio.sleep(0.01)
        assert names(await StateKeeper(file).load()) == ["f 7"]
        await keeper.close()

    run(check)


def test_keeper_leaves_alone_what_it_cannot_read() -> None:
    file = Flaky()
    file.content = b"nonsense"
    file.error = PermissionError(13, "Permission denied")

    async def check() -> None:
        keeper = StateKeeper(file)
        assert await keeper.load() is None
        assert "Permission denied" in keeper.reason
        file.error = None
        keeper.save(journal())
        await keeper.saved()
        assert file.writes == []
        other = StateKeeper(file)
        assert await other.load() is None
        assert "renamed to aside" in other.reason
        other.save(journal())
        await other.saved()
        assert len(file.writes) == 1
        assert "renamed to aside" in other.reason

    run(check)


@pytest.mark.parametrize(
    "fault", ["option missing", "option unknown", "nothing wanted"]
)
def test_a_scheduler_starts_though_its_state_makes_no_sense(
    tmp_path: Path, fault: str
) -> None:
    http = {**HTTP, "location": "HeadOnly", "uds": None}
    there = journal()
    if fault == "option missing":
        del http["uds"]
    elif fault == "option new":
        http["colour"] = "red"
    else:
        nothing = replace(there.deployments[0], serving=None, target=None)
        there = replace(there, deployments=(nothing,))
    data = encode(replace(there, http=http), 0)
    file = open_state_file(str(tmp_path / "state"))
    file.write(data)
    keeper = StateKeeper(file)

    async def start() -> None:
        scheduler = Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0")
        scheduler.add_plugin(ServeController(keeper), name=NAME)
        async with scheduler:
            assert "could not be used" in keeper.reason

    asyncio.run(start())
    (aside,) = tmp_path.glob("state.unreadable-*")
    assert str(aside) in keeper.reason
    assert aside.read_bytes() == data
