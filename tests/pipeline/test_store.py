"""Stage outputs: whole or absent, damage found, crashes survived, one writer a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import Manifest, RunLock, Store, StoreError, stage_key

REPOSITORY = Path(__file__).resolve().parents[2]


def write(store: Store, content: dict[str, bytes], stage: str = "rollouts", key: str = "k") -> Manifest:
    with store.write(1, stage, key=key, settings={"n": 2}, inputs={"problems": "d"}, seed=7) as draft:
        for name, data in content.items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_bytes(data)
        draft.counts["rows"] = len(content)
    manifest = store.manifest(1, stage)
    assert manifest is not None
    return manifest


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.communicate()
    return line


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


CONTENT = {"data.arrow": b"\x00\x01" * 700_000, "model/weights.bin": b"w", "empty": b""}


class TestWriting:
    def test_what_was_written_is_there_and_described(self, store: Store) -> None:
        manifest = write(store, CONTENT)
        folder = store.path(1, "rollouts")
        assert folder == store.root / "1" / "rollouts"
        assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
        assert manifest.files.keys() == CONTENT.keys()
        assert (manifest.stage, manifest.round, manifest.key, manifest.seed) == ("rollouts", 1, "k", 7)
        assert (manifest.settings, manifest.inputs) == ({"n": 2}, {"problems": "d"})
        assert manifest.counts == {"rows": 3}
        assert manifest.seconds >= 0 and manifest.created.endswith("+00:00")
        assert manifest.versions["python"].startswith("3.")
        assert store.check(1, "rollouts") is None
        assert everything(store.root / ".tmp") == []

    def test_manifest_survives_json(self, store: Store) -> None:
        manifest = write(store, CONTENT)
        assert Manifest.from_json(manifest.to_json()) == manifest

    def test_same_content_has_the_same_digest(self, store: Store) -> None:
        first = write(store, CONTENT, "a", key="one")
        again = write(store, dict(reversed(CONTENT.items())), "b", key="two")
        assert first.digest == again.digest
        assert write(store, {**CONTENT, "empty": b"x"}, "c").digest != first.digest
        assert write(store, {"renamed": b"w"}, "d").digest != write(store, {"name": b"w"}, "e").digest

    def test_new_output_replaces_the_old_one_whole(self, store: Store) -> None:
        write(store, {"old": b"1", "both": b"1"})
        write(store, {"new": b"2", "both": b"2"})
        assert everything(store.path(1, "rollouts")) == ["both", "manifest.json", "new"]
        assert store.check(1, "rollouts") is None
        assert list((store.root / ".tmp").iterdir()) == []

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_exception_leaves_nothing_and_keeps_the_old(self, store: Store, error: type[BaseException]) -> None:
        old = write(store, {"old": b"1"})

        def failing(stage: str) -> None:
            with store.write(1, stage, key="k", settings={}, inputs={}, seed=0) as draft:
                (draft.path / "half").write_bytes(b"h")
                raise error("stopped")

        for stage in ("rollouts", "judge"):
            with pytest.raises(error, match="stopped"):
                failing(stage)
        assert list((store.root / ".tmp").iterdir()) == []
        assert store.manifest(1, "rollouts") == old
        assert store.check(1, "rollouts") is None
        assert not store.path(1, "judge").exists()

    def test_failing_rename_restores_the_old(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        old = write(store, {"old": b"1"})
        rename = os.rename

        def fail_for_drafts(source: Path, target: Path) -> None:
            if (Path(source) / "new").exists():
                raise PermissionError("no")
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail_for_drafts)
        with pytest.raises(PermissionError):
            write(store, {"new": b"2"})
        assert store.manifest(1, "rollouts") == old
        assert store.check(1, "rollouts") is None
        assert list((store.root / ".tmp").iterdir()) == []

    def test_links_and_a_manifest_of_the_stage_are_refused(self, store: Store) -> None:
        def linked() -> None:
            with store.write(1, "a", key="k", settings={}, inputs={}, seed=0) as draft:
                (draft.path / "link").symlink_to("/etc/hostname")

        with pytest.raises(StoreError, match="link"):
            linked()
        with pytest.raises(StoreError, match=r"manifest\.json"):
            write(store, {"manifest.json": b"{}"})
        assert not (store.root / "1").exists()

    def test_settings_that_are_no_json_are_refused_before_the_work(self, store: Store) -> None:
        for bad in (Path("x"), float("nan"), {1, 2}):
            with (
                pytest.raises(StoreError, match="settings of stage a"),
                store.write(1, "a", key="k", settings={"bad": bad}, inputs={}, seed=0),
            ):
                pytest.fail("the body must not run")

    @pytest.mark.parametrize("stage", ["", "..", "a/b", ".tmp", "/etc", "a\n"])
    def test_names_stay_inside_the_run(self, store: Store, stage: str) -> None:
        with pytest.raises(StoreError):
            store.path(1, stage)
        with pytest.raises(StoreError):
            store.path(-1, "rollouts")


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: flip(folder / "data.arrow", -1), "data.arrow does not match its checksum"),
            (lambda folder: (folder / "data.arrow").write_bytes(b""), "data.arrow does not match its checksum"),
            (lambda folder: (folder / "model/weights.bin").unlink(), "model/weights.bin is missing"),
            (lambda folder: (folder / "model/more").write_bytes(b""), "model/more does not belong"),
            (lambda folder: replace_by_link(folder / "data.arrow"), "data.arrow is a link"),
            (lambda folder: os.mkfifo(folder / "pipe"), "pipe is a link or no plain file"),
            (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
            (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is not JSON"),
            (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "decode"),
            (lambda folder: (folder / "manifest.json").write_text('{"a": NaN}'), "manifest.json"),
            (shutil.rmtree, "no such output"),
        ],
    )
    def test_is_found_and_named(self, store: Store, damage: Callable[[Path], object], message: str) -> None:
        write(store, CONTENT)
        damage(store.path(1, "rollouts"))
        found = store.check(1, "rollouts")
        assert found is not None and message in found
        assert "\n" not in found and str(store.path(1, "rollouts")) in found

    def test_any_flipped_byte_of_the_manifest_is_found(self, store: Store) -> None:
        manifest = write(store, {"a": b"1"})
        path = store.path(1, "rollouts") / "manifest.json"
        for at in range(path.stat().st_size):
            flip(path, at)
            assert store.manifest(1, "rollouts") in (None, manifest), at  # equal: white space changed
            flip(path, at)

    def test_edited_count_is_found(self, store: Store) -> None:
        write(store, CONTENT)
        path = store.path(1, "rollouts") / "manifest.json"
        path.write_text(path.read_text().replace('"rows": 3', '"rows": 4'))
        assert store.manifest(1, "rollouts") is None
        assert "checksum" in str(store.check(1, "rollouts"))

    def test_output_moved_to_another_stage_or_round_is_found(self, store: Store) -> None:
        write(store, CONTENT)
        shutil.copytree(store.path(1, "rollouts"), store.path(2, "rollouts"))
        assert store.manifest(2, "rollouts") is None
        assert "round 1" in str(store.check(2, "rollouts"))

    def test_manifest_of_another_program_version(self, store: Store) -> None:
        manifest = write(store, CONTENT)
        values = json.loads(manifest.to_json())
        del values["seed"], values["checksum"]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        values["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
        with pytest.raises(StoreError, match="another version"):
            Manifest.from_json(json.dumps(values))


WRITER = """
import sys, time
from pathlib import Path
from pipeline.store import RunLock, Store
root = Path(sys.argv[1])
with RunLock(root), Store(root).write(1, "rollouts", key="k", settings={}, inputs={}, seed=0) as draft:
    (draft.path / "half").write_bytes(b"h" * 100_000)
    print("writing", flush=True)
    time.sleep(600)
"""

DYING_AT_RENAME = """
import os, sys
from pathlib import Path
from pipeline.store import RunLock, Store
root, survived, rename = Path(sys.argv[1]), int(sys.argv[2]), os.rename
def dying(source, target):
    global survived
    if survived == 0:
        os.kill(os.getpid(), 9)
    survived -= 1
    rename(source, target)
os.rename = dying
with RunLock(root), Store(root).write(1, "rollouts", key="new", settings={}, inputs={}, seed=0) as draft:
    (draft.path / "new").write_bytes(b"2")
    if len(sys.argv) > 3:
        import shutil
        shutil.rmtree = lambda path: os.kill(os.getpid(), 9)
"""


class TestCrashes:
    def test_kill_in_the_middle_keeps_the_old_and_the_next_lock_cleans(self, store: Store) -> None:
        old = write(store, {"old": b"1"})
        process = python(WRITER, store.root)
        wait_for_line(process)
        kill(process)
        assert store.manifest(1, "rollouts") == old
        assert store.check(1, "rollouts") is None
        assert [path.name for path in (store.root / ".tmp").rglob("half")] == ["half"]
        with RunLock(store.root):
            assert list((store.root / ".tmp").iterdir()) == []
        assert write(store, {"new": b"2"}).counts == {"rows": 1}

    @pytest.mark.parametrize(("renames", "key"), [(0, "old"), (1, None), (2, "new")])
    def test_kill_at_every_rename_leaves_old_none_or_new(self, store: Store, renames: int, key: str | None) -> None:
        write(store, {"old": b"1"}, key="old")
        process = python(DYING_AT_RENAME, store.root, renames, *(["and at removing the old"] if renames == 2 else []))
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        manifest = store.manifest(1, "rollouts")
        assert (manifest.key if manifest else None) == key
        assert (store.check(1, "rollouts") is None) == (key is not None)
        assert list((store.root / ".tmp").iterdir()) != []
        with RunLock(store.root):
            assert list((store.root / ".tmp").iterdir()) == []
        assert store.manifest(1, "rollouts") == manifest

    def test_drafts_of_the_living_are_left_alone(self, store: Store) -> None:
        with store.write(1, "rollouts", key="k", settings={}, inputs={}, seed=0) as draft:
            (draft.path / "a").write_bytes(b"1")
            dead = store.root / ".tmp" / f"judge-{os.getpid()}-0"  # a number that is in use again
            dead.mkdir()
            with RunLock(store.root):
                assert not dead.exists()
        assert store.check(1, "rollouts") is None


ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from pipeline.store import Store, StoreError
store = Store(Path(sys.argv[1]))
def write(size):
    with store.write(1, "rollouts", key="k", settings={}, inputs={}, seed=0) as draft:
        with open(draft.path / "data", "wb") as file:
            file.write(b"x" * size)
write(100_000)
before = store.manifest(1, "rollouts")
try:
    write(1_000_000)
except StoreError as error:
    print(error)
assert store.manifest(1, "rollouts") == before and store.check(1, "rollouts") is None
assert list((store.root / ".tmp").iterdir()) == []
write(50_000)
"""


class TestFullDisk:
    @pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
    def test_real_small_disk(self, tmp_path: Path) -> None:
        mount = 'mount -t tmpfs -o size=512k tmpfs "$0" || exit 77; exec "$@"'
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, tmp_path, sys.executable, "-c", ON_A_FULL_DISK, tmp_path / "run"],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 77 or "unshare" in done.stderr:
            pytest.skip(f"no small disk could be mounted: {done.stderr}")
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        assert "1/rollouts could not be written" in line and "No space left on device" in line
        assert "bytes are free" in line

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_noticed_only_when_synced(self, store: Store, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        old = write(store, {"old": b"1"})

        def full(fd: int) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match=r"rollouts could not be written: .*bytes are free"):
                write(store, {"new": b"2"})
        assert store.manifest(1, "rollouts") == old
        assert store.check(1, "rollouts") is None

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_library_that_wraps_or_only_quotes_the_error(self, store: Store) -> None:
        def wrapping(only_text: bool) -> None:
            with store.write(1, "sft", key="k", settings={}, inputs={}, seed=0):
                try:
                    with open("/dev/full", "wb", buffering=0) as file:
                        file.write(b"x")
                except OSError as error:
                    raise RuntimeError(f"I/O error: {error}") from (None if only_text else error)

        for only_text in (True, False):
            with pytest.raises(StoreError, match="No space left on device"):
                wrapping(only_text)

    def test_other_errors_of_the_system_stay_what_they_are(self, store: Store) -> None:
        with (
            pytest.raises(PermissionError),
            store.write(1, "sft", key="k", settings={}, inputs={}, seed=0),
        ):
            raise PermissionError(errno.EACCES, "no")


HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.store import RunLock
with RunLock(Path(sys.argv[1])):
    forks = len(sys.argv) > 2
    if not forks or os.fork() == 0:
        print(os.getpid(), flush=True)  # a child prints only when it has run what follows a fork in it
    time.sleep(600)
"""


class TestRunLock:
    def test_second_process_is_refused_until_the_first_is_killed(self, store: Store) -> None:
        process = python(HOLDER, store.root)
        wait_for_line(process)
        with pytest.raises(StoreError) as refused, RunLock(store.root):
            pass
        message = str(refused.value)
        assert str(store.root) in message and f"process {process.pid} on {os.uname().nodename} since 20" in message
        assert "\n" not in message
        kill(process)
        with RunLock(store.root):
            pass

    def test_forked_child_of_a_killed_holder_does_not_keep_it(self, store: Store) -> None:
        process = python(HOLDER, store.root, "fork")
        child = int(wait_for_line(process))
        process.send_signal(signal.SIGKILL)
        process.wait()
        try:
            with RunLock(store.root):
                os.kill(child, 0)  # it is alive
        finally:
            os.kill(child, signal.SIGKILL)
            process.communicate()

    def test_free_again_after_an_exception(self, store: Store) -> None:
        with pytest.raises(ValueError, match="x"), RunLock(store.root):
            raise ValueError("x")
        with RunLock(store.root), pytest.raises(StoreError, match=f"process {os.getpid()}"), RunLock(store.root):
            pass
        with RunLock(store.root):
            pass

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="cannot be locked"), RunLock(tmp_path / "file" / "run"):
            pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: object, rng: random.Random) -> object:
    if isinstance(value, dict):
        items = [(name, shuffled(inner, rng)) for name, inner in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(inner, rng) for inner in value] if isinstance(value, list) else value


class TestStageKey:
    @given(
        st.dictionaries(st.text(), json_values, max_size=4),
        st.dictionaries(st.text(), st.text(), max_size=4),
        st.randoms(use_true_random=False),
    )
    def test_order_and_a_trip_through_json_change_nothing(
        self, settings: dict[str, object], inputs: dict[str, str], rng: random.Random
    ) -> None:
        other_settings, other_inputs = shuffled(settings, rng), shuffled(inputs, rng)
        assert isinstance(other_settings, dict) and isinstance(other_inputs, dict)
        key = stage_key("sft", "1", settings, inputs)
        assert key == stage_key("sft", "1", other_settings, other_inputs)
        assert key == stage_key("sft", "1", json.loads(json.dumps(settings)), inputs)

    def test_every_part_counts(self) -> None:
        keys = [
            stage_key("sft", "1", {"a": 1}, {"model": "x"}),
            stage_key("dpo", "1", {"a": 1}, {"model": "x"}),
            stage_key("sft", "2", {"a": 1}, {"model": "x"}),
            stage_key("sft", "1", {"a": 2}, {"model": "x"}),
            stage_key("sft", "1", {"a": 1}, {"model": "y"}),
            stage_key("sft", "1", {"a": 1}, {"base": "x"}),
            stage_key("sft", "1", {"a": 1, "model": "x"}, {}),
        ]
        assert len(set(keys)) == len(keys)

    def test_settings_that_are_no_json(self) -> None:
        with pytest.raises(StoreError, match="stage sft"):
            stage_key("sft", "1", {"a": float("inf")}, {})


def test_imports_stay_light() -> None:
    code = "import sys, pipeline.store, pipeline.telemetry; print({'torch', 'ray', 'datasets'} & sys.modules.keys())"
    out, err = python(code).communicate()
    assert out.strip() == "set()", err
