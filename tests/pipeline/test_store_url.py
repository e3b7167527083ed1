"""Runs at a URL: outputs are whole or absent for every reader, failures are one line, and nothing is lost here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.store import StoreError
from pipeline.store import __main__ as command
from pipeline.store.remote import Remote
from pipeline.store.synced import SyncedStore, working_copy
from pipeline.store.url import DamageError
from tests.pipeline.stores import Flaky, build, content, hanging, machine, new_url, reader, unreachable

REPOSITORY = Path(__file__).resolve().parents[2]
OLD = {"data.arrow": "old" * 1000, "model/weights": "w", "empty": ""}
NEW = {"data.arrow": "new" * 1000, "model/weights": "v", "more": "m"}

pytestmark = pytest.mark.usefixtures("a_store_that_works")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, tmp_path)


@pytest.fixture
def flaky(tmp_path: Path) -> str:
    return new_url("flaky", tmp_path)


class TestOutputs:
    def test_another_machine_reads_what_one_has_built(self, url: str, tmp_path: Path) -> None:
        manifest = build(machine(url, tmp_path / "a"), "sft", OLD)
        other = machine(url, tmp_path / "b")
        assert other.manifest(1, "sft") == manifest and not other.path(1, "sft").exists()  # it is fetched when it is read
        assert other.check(1, "sft") is None and other.text(1, "sft", "model/weights") == "w"
        assert content(other.here(1, "sft")) == OLD
        assert other.check(1, "sft") is None and list((tmp_path / "b" / ".tmp").iterdir()) == []

    def test_a_new_output_replaces_the_old_one_everywhere(self, url: str, tmp_path: Path) -> None:
        build(machine(url, tmp_path / "a"), "sft", OLD)
        machine(url, tmp_path / "b").here(1, "sft")
        build(machine(url, tmp_path / "a"), "sft", NEW)
        assert content(machine(url, tmp_path / "b").here(1, "sft")) == NEW
        assert reader(url).leftovers(False) == [] and reader(url).check(1, "sft") is None

    def test_what_is_there_already_is_not_copied_again(self, flaky: str, tmp_path: Path) -> None:
        build(machine(flaky, tmp_path), "sft", OLD)
        written: list[str] = []
        Flaky.before = staticmethod(lambda action, path: written.append(path) if action == "put" else None)
        machine(flaky, tmp_path).share(1, "sft")
        assert content(machine(flaky, tmp_path).here(1, "sft")) == OLD and not written

    def test_damage_here_is_mended_from_there(self, url: str, tmp_path: Path) -> None:
        build(machine(url, tmp_path / "a"), "sft", OLD)
        (tmp_path / "a" / "1" / "sft" / "empty").write_text("x")
        store = machine(url, tmp_path / "a")
        assert store.check(1, "sft") is None and content(store.here(1, "sft")) == OLD

    def test_damage_there_is_found_before_it_is_used(self, url: str, tmp_path: Path) -> None:
        manifest = build(machine(url, tmp_path / "a"), "sft", OLD)
        Remote(url).write(f"1/sft/{manifest.digest[:16]}/model/weights", b"x")
        other = machine(url, tmp_path / "b")
        with pytest.raises(DamageError, match=r"1/sft: model/weights does not match its checksum"):
            other.here(1, "sft")
        assert not other.path(1, "sft").exists()
        assert str(reader(url).check(1, "sft")).endswith("model/weights does not match its checksum")
        with other.lock(), pytest.raises(StoreError, match="the same command builds it again"):
            other.here(1, "sft")
        assert machine(url, tmp_path / "b").manifest(1, "sft") is None

    def test_a_manifest_does_not_write_outside_of_the_output(self, url: str, tmp_path: Path) -> None:
        from dataclasses import replace

        manifest = build(machine(url, tmp_path / "a"), "sft", OLD)
        Remote(url).write("1/sft/manifest.json", replace(manifest, files={"../../../evil": "0"}).to_json().encode())
        assert machine(url, tmp_path / "b").manifest(1, "sft") is None
        assert "names files outside" in str(reader(url).check(1, "sft"))


class TestFailures:
    @pytest.mark.parametrize("survived", range(5))
    def test_an_upload_that_breaks_off_shows_the_old_or_nothing_and_is_completed(
        self, flaky: str, tmp_path: Path, survived: int
    ) -> None:
        build(machine(flaky, tmp_path / "a"), "sft", OLD)
        left = survived

        def breaks(action: str, path: str) -> None:
            nonlocal left
            if action == "put":
                left -= 1
                if left < 0:
                    raise ConnectionResetError("the line went dead")

        Flaky.before = staticmethod(breaks)
        store, whole = machine(flaky, tmp_path / "a"), survived == 4  # three files and the manifest
        if whole:
            build(store, "sft", NEW)
        else:
            with pytest.raises(StoreError) as raised:
                build(store, "sft", NEW)
            said = str(raised.value)
            assert said.startswith(flaky) and "the line went dead" in said and "the same command puts it there" in said
            assert "\n" not in said
        Flaky.before = staticmethod(lambda action, path: None)
        assert content(machine(flaky, tmp_path / "b").here(1, "sft")) == (NEW if whole else OLD)
        assert content(tmp_path / "a" / "1" / "sft") == NEW  # nothing is lost here
        again = machine(flaky, tmp_path / "a")
        assert again.manifest(1, "sft") == store.manifest(1, "sft")
        again.share(1, "sft")
        assert content(machine(flaky, tmp_path / "b").here(1, "sft")) == NEW and reader(flaky).leftovers(False) == []

    def test_one_failure_is_tried_again(self, flaky: str, tmp_path: Path) -> None:
        failures = iter([ConnectionError("once"), ConnectionError("twice")])

        def fails(action: str, path: str) -> None:
            for error in failures:
                raise error

        Flaky.before = staticmethod(fails)
        build(machine(flaky, tmp_path), "sft", OLD)
        assert reader(flaky).check(1, "sft") is None

    def test_a_store_that_hangs_ends_in_a_line(self, flaky: str) -> None:
        Flaky.before = staticmethod(hanging)
        with pytest.raises(StoreError, match=rf"^{flaky}: reading config.yaml: no answer within 0 s$"):
            Remote(flaky, patience=0.05).read("config.yaml")

    def test_a_disk_that_is_full_while_fetching(self, flaky: str, tmp_path: Path) -> None:
        build(machine(flaky, tmp_path / "a"), "sft", OLD)

        def full(action: str, path: str) -> None:
            if action == "get" and path.endswith("weights"):
                raise OSError(28, os.strerror(28))

        other = machine(flaky, tmp_path / "b")
        Flaky.before = staticmethod(full)
        with pytest.raises(StoreError, match=r"model/weights: OSError.*No space left on device"):
            other.here(1, "sft")
        assert not other.path(1, "sft").exists() and list((tmp_path / "b" / ".tmp").iterdir()) == []

    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            ("nowhere://bucket/run", "Protocol not known: nowhere"),
            ("ftp://me:secret@host/run", "must not hold a name or password"),
        ],
    )
    def test_a_url_that_cannot_be_used(self, bad: str, said: str) -> None:
        with pytest.raises(StoreError, match=said) as raised:
            Remote(bad)
        assert "secret" not in str(raised.value)

    def test_a_missing_package_is_named(self) -> None:
        try:
            import s3fs  # noqa: F401
        except ImportError:
            with pytest.raises(StoreError, match=r"s3://bucket/run: a package is missing: .*s3fs"):
                Remote("s3://bucket/run")


KILLED = """
import os, sys
from pathlib import Path
from pipeline.store import remote
from pipeline.store.synced import SyncedStore
url, folder, survived, put = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), remote.Remote.put
def dying(self, file, name):
    global survived
    if survived == 0:  # in the middle of a file
        target = Path(self._at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes()[:2])
        os.kill(os.getpid(), 9)
    survived -= 1
    put(self, file, name)
remote.Remote.put = dying
store = SyncedStore.open(url, folder)
with store.lock(), store.write(1, "sft", key="k", settings={}, inputs={}, seed=0) as draft:
    for name in "abc":
        (draft.path / name).write_text(name * 100)
"""


@pytest.mark.parametrize("survived", [0, 2])
def test_kill_9_during_an_upload(tmp_path: Path, survived: int) -> None:
    url = f"file://{tmp_path}/there"
    done = subprocess.run([sys.executable, "-c", KILLED, url, tmp_path / "a", str(survived)], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    assert reader(url).manifest(1, "sft") is None and machine(url, tmp_path / "b").manifest(1, "sft") is None
    store = machine(url, tmp_path / "a")
    with store.lock():  # the dead holder's lease is of this working copy, so nobody waits for it
        store.share(1, "sft")
    assert content(machine(url, tmp_path / "b").here(1, "sft")) == {name: name * 100 for name in "abc"}


def test_readers_beside_a_writer_see_whole_outputs(url: str, tmp_path: Path) -> None:
    """Each fetch gives one of the two contents, whole, or says that there is none to be had; it never mixes them."""
    writer = machine(url, tmp_path / "writer")
    build(writer, "sft", OLD)
    done, found, wrong = threading.Event(), [], []

    def read(name: str) -> None:
        number = 0
        while not done.is_set() or number < 2:
            number += 1
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            try:
                reader(url).download(1, "sft", folder)
            except DamageError:
                continue  # replaced faster than it could be read, time and again
            except BaseException as error:
                wrong.append(error)
                return
            found.append(content(folder))

    threads = [threading.Thread(target=read, args=(name,)) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    for number in range(8):
        build(writer, "sft", NEW if number % 2 else OLD, key=str(number))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong and found and all(one in (OLD, NEW) for one in found)


class TestTwoMachines:
    def test_what_another_machine_has_built_since_counts(self, url: str, tmp_path: Path) -> None:
        build(machine(url, tmp_path / "a"), "sft", OLD)
        build(machine(url, tmp_path / "b"), "sft", NEW, key="other")
        store = machine(url, tmp_path / "a")
        manifest = store.manifest(1, "sft")
        assert manifest and manifest.key == "other"
        store.share(1, "sft")  # of what is older here
        assert content(store.here(1, "sft")) == NEW

    def test_an_output_built_in_place_of_one_never_fetched(self, flaky: str, tmp_path: Path) -> None:
        """Its upload fails: it still is the newer one here."""
        build(machine(flaky, tmp_path / "a"), "sft", OLD)
        store = machine(flaky, tmp_path / "b")
        Flaky.before = staticmethod(lambda action, path: unreachable(action, path) if action == "put" else None)
        with pytest.raises(StoreError):
            build(store, "sft", NEW)
        Flaky.before = staticmethod(lambda action, path: None)
        again = machine(flaky, tmp_path / "b")
        again.share(1, "sft")
        assert content(machine(flaky, tmp_path / "a").here(1, "sft")) == NEW

    def test_different_urls_have_different_working_copies(self, tmp_path: Path) -> None:
        urls = ["s3://a/b", "s3://a-b", "gs://a/b", "s3://a/b/c"]
        assert len({working_copy(tmp_path, one) for one in urls}) == len(urls)


class TestCommand:
    @pytest.fixture
    def run(self, url: str, tmp_path: Path) -> SyncedStore:
        """problems -> sft, and an upload that broke off."""
        store = machine(url, tmp_path / "run")
        problems = build(store, "problems", {"p": "p"})
        build(store, "sft", {"a": "a" * 100}, problems=problems.digest)
        Remote(url).write("1/sft/0123456789abcdef/half", b"h")
        Remote(url).write(".resume/1-grpo/k/state.json", b"{}")
        return store

    def test_ls_verify_and_gc(self, run: SyncedStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main(["ls", url]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:3] for line in lines[1:]] == [["1", "problems", "1"], ["1", "sft", "1"]]
        assert command.main(["verify", url]) == 0 and "2 outputs, 0 damaged" in capsys.readouterr().out
        before = Remote(url).sizes()
        assert command.main(["gc", "--dry-run", url]) == 0 and Remote(url).sizes() == before
        assert command.main(["gc", url]) == 0
        assert before.keys() - Remote(url).sizes().keys() == {"1/sft/0123456789abcdef/half"}
        assert command.main(["gc", "--checkpoints", url]) == 0
        assert "folders that are gone: 1" in capsys.readouterr().out.splitlines()[-1] and not Remote(url).sizes(".resume")
        build(run, "problems", {"p": "others"})
        assert command.main(["ls", url]) == 0 and "its problems has changed" in capsys.readouterr().out
        assert command.main(["gc", url]) == 0
        assert reader(url).places() == [(1, "problems")] and command.main(["verify", url]) == 0

    def test_damage(self, run: SyncedStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        manifest = run.manifest(1, "sft")
        assert manifest
        Remote(url).write(f"1/sft/{manifest.digest[:16]}/a", b"b" * 100)
        assert command.main(["verify", url]) == 1
        assert f"{url}/1/sft: a does not match its checksum\n2 outputs, 1 damaged" in capsys.readouterr().out
        Remote(url).write("1/sft/manifest.json", b"{")
        assert command.main(["ls", url]) == 0 and "missing or damaged" in capsys.readouterr().out
        assert command.main(["gc", url]) == 0 and reader(url).places() == [(1, "problems")]

    @pytest.mark.parametrize("what", ["ls", "verify", "gc"])
    def test_failures_are_one_line(self, flaky: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert command.main([what, flaky]) == 1
        assert capsys.readouterr().err == f"error: {flaky} is no run: it holds no rounds\n"
        Flaky.before = staticmethod(unreachable)
        assert command.main([what, flaky]) == 1
        assert capsys.readouterr().err == f"error: {flaky}: listing it: ConnectionError: connection refused\n"


class TestRun:
    """`python run.py run.root=URL`, on two machines, which are two caches."""

    @pytest.fixture(autouse=True)
    def quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.cli.quiet_third_parties", lambda log_file: None)

    def arguments(self, url: str, cache: Path, *more: str) -> list[str]:
        few = [f"task.{split}=16" for split in ("train", "dev", "test", "ood")]
        return ["--config", "smoke", "--until", "problems", f"run.root={url}", f"run.cache={cache}", *few, *more]

    def test_outputs_stand_at_the_url(self, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(self.arguments(url, tmp_path / "a")) == 0
        store = reader(f"{url}/smoke")
        assert store.places() == [(0, "problems")] and store.check(0, "problems") is None
        assert store.remote.read("config.yaml") and store.remote.read(".lease") is None
        capsys.readouterr()
        assert main(self.arguments(url, tmp_path / "b")) == 0
        assert "reused" in capsys.readouterr().out
        assert main(self.arguments(url, tmp_path / "b", "--dry-run")) == 0
        assert "round 0  problems  reuse" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "b")
        assert main(self.arguments(url, tmp_path / "b", "run.seed=1")) == 0
        manifest = store.manifest(0, "problems")
        assert manifest and manifest.seed == 1

    def test_a_store_that_goes_away_in_the_middle(self, flaky: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def gone_for_outputs(action: str, path: str) -> None:
            if action == "put" and "/0/problems/" in path:
                unreachable(action, path)

        Flaky.before = staticmethod(gone_for_outputs)
        assert main(self.arguments(flaky, tmp_path)) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and f"error: {flaky}/smoke: writing 0/problems/" in lines[0] and "connection refused" in lines[0]
        Flaky.before = staticmethod(lambda action, path: None)
        assert main(self.arguments(flaky, tmp_path)) == 0
        assert "reused" in capsys.readouterr().out and reader(f"{flaky}/smoke").check(0, "problems") is None

    def test_a_store_that_is_not_there(self, flaky: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Flaky.before = staticmethod(unreachable)
        assert main(self.arguments(flaky, tmp_path)) == 1
        assert capsys.readouterr().err == f"error: {flaky}/smoke: listing it: ConnectionError: connection refused\n"

    def test_a_second_job_is_refused(self, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = machine(f"{url}/smoke", tmp_path / "first")
        with first.lock():
            (lease,) = first._lease
            lease._beat_seconds = 0.05
            assert json.loads(Remote(f"{url}/smoke").read(".lease") or b"{}")["beat"] == 0
            beating = threading.Event()

            def beat() -> None:
                while not beating.wait(0.05):
                    lease._beats += 1
                    Remote(f"{url}/smoke").write(".lease", lease._content())

            thread = threading.Thread(target=beat)
            thread.start()
            try:
                assert main(self.arguments(url, tmp_path / "second")) == 1
            finally:
                beating.set()
                thread.join()
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"error: {url}/smoke is in use by process {os.getpid()} of " in error
