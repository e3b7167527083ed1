"""One job at a time holds a run at a URL, and no clock of another machine decides who; checkpoints are copied as they stood."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import StoreError
from pipeline.store import lease as lease_module
from pipeline.store.lease import Lease
from pipeline.store.mirror import Mirror
from pipeline.store.remote import Remote
from tests.pipeline.stores import Flaky, build, content, machine, new_url, reader, unreachable

pytestmark = pytest.mark.usefixtures("a_store_that_works")


@pytest.fixture(params=["flaky", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, tmp_path)


class Watched:
    """Time that passes only while the watcher sleeps; `each` happens at every sleep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: Callable[[], None] = lambda: None) -> None:
        self.now, self._each = 1000.0, each
        monkeypatch.setattr(lease_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(lease_module.time, "sleep", self.sleep)
        monkeypatch.setattr(lease_module.time, "time", lambda: pytest.fail("no wall clock"))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._each()


def quiet(text: str) -> None: ...


def never_beating(url: str, home: str = "") -> Lease:
    return Lease(Remote(url), home, quiet, beat=1e6)


class TestLease:
    def test_a_holder_that_lives_refuses_others(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with never_beating(url) as first:

            def beat() -> None:
                first._beats += 1
                first._remote.write(".lease", first._content())

            clock = Watched(monkeypatch, beat)
            with pytest.raises(StoreError, match=rf"^{url} is in use by process \d+ of .+; stop that run or use another name$"):
                never_beating(url).__enter__()
            assert clock.now < 1010  # the first change is enough
            first.check()
        with never_beating(url):
            pass
        assert Remote(url).read(".lease") is None

    def test_one_that_stands_still_is_dead_after_a_while(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        dead = never_beating(url)
        dead.__enter__()
        clock = Watched(monkeypatch)
        with never_beating(url) as second:
            assert clock.now >= 1000 + lease_module.DEAD
            with pytest.raises(StoreError, match=r"was taken over by process \d+ of"):
                dead.check()
            second.check()
            dead.__exit__(None, None, None)  # it does not give back what is another's
            second.check()

    def test_the_beat_is_what_a_living_holder_changes(self, url: str) -> None:
        remote, seen = Remote(url), set()
        with Lease(remote, beat=0.01):
            while len(seen) < 3:
                seen.add(remote.read(".lease"))
        assert len({json.loads(one or b"")["token"] for one in seen}) == 1

    def test_the_same_working_copy_waits_for_nobody(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        never_beating(url, "home").__enter__()
        clock = Watched(monkeypatch)
        with never_beating(url, "home"):
            assert clock.now < 1010

    def test_of_two_that_take_over_the_same_one_the_last_has_it(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        never_beating(url, "home").__enter__()
        other = never_beating(url, "home")

        def too() -> None:  # both have seen it dead, and the other one is the slower of the two
            other._remote.remove(".lease")
            assert other._remote.create(".lease", other._content())

        Watched(monkeypatch, too)
        with pytest.raises(StoreError, match="is in use by"):
            never_beating(url, "home").__enter__()
        other.check()

    def test_a_job_that_has_lost_it_changes_no_output(self, url: str, tmp_path: Path) -> None:
        build(machine(url, tmp_path / "a"), "sft", {"a": "1"})
        store = machine(url, tmp_path / "a")
        with store.lock():
            Remote(url).write(".lease", b'{"token": "another", "holder": "process 1 of ana on node7"}')
            with pytest.raises(StoreError, match="was taken over by process 1 of ana on node7"):
                build(store, "sft", {"a": "2"})
        assert content(machine(url, tmp_path / "b").here(1, "sft")) == {"a": "1"}
        assert b"another" in (Remote(url).read(".lease") or b"")


class TestCheckpoints:
    def kept(self, root: Path) -> Path:
        return root / ".resume" / "1-sft" / "key"

    def mirror(self, url: str, root: Path, said: list[str]) -> Mirror:
        root.mkdir(exist_ok=True)
        return Mirror(Remote(url), root, self.kept(root), root / ".synced" / "sft", lambda: None, said.append, every=1e6)

    def checkpoint(self, root: Path, step: int) -> None:
        folder = self.kept(root) / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"weights of {step}")
        (folder / "same").write_text("the same in all")

    def stopped(self, mirror: Mirror, work: Callable[[], None]) -> None:
        with pytest.raises(KeyboardInterrupt), mirror:
            work()
            raise KeyboardInterrupt

    def test_another_machine_goes_on_and_the_first_one_after_it(self, url: str, tmp_path: Path) -> None:
        said: list[str] = []
        a, b = tmp_path / "a", tmp_path / "b"
        self.stopped(self.mirror(url, a, said), lambda: self.checkpoint(a, 1))
        assert not said

        def go_on(root: Path, step: int) -> None:
            assert content(self.kept(root)).keys() == {f"step-{step - 1}/weights", f"step-{step - 1}/same"}
            self.checkpoint(root, step)
            for file in (self.kept(root) / f"step-{step - 1}").iterdir():
                file.unlink()

        self.stopped(self.mirror(url, b, said), lambda: go_on(b, 2))
        assert said == ["goes on from checkpoints that another machine has left in the store"]
        self.stopped(self.mirror(url, a, said), lambda: go_on(a, 3))
        assert len(said) == 2 and len(Remote(url).sizes(".resume")) == 3  # the list, weights and what is the same
        with self.mirror(url, a, said):
            assert "step-3/weights" in content(self.kept(a))
        assert not Remote(url).sizes(".resume") and len(said) == 2  # the output stands

    def test_what_is_newer_here_is_kept(self, url: str, tmp_path: Path) -> None:
        said: list[str] = []
        self.stopped(self.mirror(url, tmp_path / "a", said), lambda: self.checkpoint(tmp_path / "a", 1))
        self.checkpoint(tmp_path / "a", 2)  # killed before it was copied
        with self.mirror(url, tmp_path / "a", said):
            assert "step-2/weights" in content(self.kept(tmp_path / "a"))

    def test_a_folder_that_changes_meanwhile_is_not_taken(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        mirror, put = self.mirror(url, tmp_path / "a", said), Remote.put
        self.checkpoint(tmp_path / "a", 1)
        weights = self.kept(tmp_path / "a") / "step-1" / "weights"

        def writing(remote: Remote, file: Path, name: str) -> None:
            put(remote, file, name)
            weights.write_text("more and more")

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "put", writing)
            mirror.copy()
        assert Remote(url).read(".resume/1-sft/key/state.json") is None
        mirror.copy()
        with self.mirror(url, tmp_path / "b", said):
            assert content(self.kept(tmp_path / "b"))["step-1/weights"] == "more and more"

    def test_a_store_that_fails_is_warned_of_once_and_the_stage_goes_on(self, tmp_path: Path) -> None:
        said: list[str] = []
        url, root = new_url("flaky", tmp_path), tmp_path / "a"
        with self.mirror(url, root, said) as mirror:
            Flaky.before = staticmethod(unreachable)
            self.checkpoint(root, 1)
            mirror._try()
            mirror._try()
            assert len(said) == 1 and "the stage goes on" in said[0] and f"{url}: listing" in said[0]
            Flaky.before = staticmethod(lambda action, path: None)
            mirror._try()
            assert Remote(url).read(".resume/1-sft/key/state.json")

    def test_damaged_ones_are_not_used(self, url: str, tmp_path: Path) -> None:
        said: list[str] = []
        self.stopped(self.mirror(url, tmp_path / "a", said), lambda: self.checkpoint(tmp_path / "a", 1))
        for name in Remote(url).sizes(".resume/1-sft/key/files"):
            Remote(url).write(name, b"x")
        with self.mirror(url, tmp_path / "b", said):
            assert not self.kept(tmp_path / "b").exists()
        assert "are damaged and not used" in said[0] and not list((tmp_path / "b").rglob("weights"))

    def test_those_of_other_settings_go(self, url: str, tmp_path: Path) -> None:
        store = machine(url, tmp_path / "a")
        Remote(url).write(".resume/1-sft/other/state.json", b"{}")
        with store.keeping(self.kept(tmp_path / "a"), quiet):
            assert not Remote(url).sizes(".resume")


def test_model_folders_can_be_loaded_when_they_are_whole(url: str, tmp_path: Path) -> None:
    """config.json is there only while all else is."""
    store = machine(url, tmp_path)
    model = tmp_path / "model"
    model.mkdir(parents=True)
    for number in (1, 2):
        for name in ("config.json", "model.safetensors", f"only-{number}"):
            (model / name).write_text(str(number))
        store.publish("model")
        (model / f"only-{number}").unlink()
    assert reader(url).remote.sizes("model").keys() == {"model/config.json", "model/model.safetensors", "model/only-2"}
    if not url.startswith("flaky"):
        return
    names: list[str] = []
    Flaky.before = staticmethod(lambda action, path: names.append(Path(path).name) if action == "put" else None)
    store.publish("model")
    assert names[-1] == "config.json"
