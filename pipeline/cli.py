"""Arguments -> configuration -> Pipeline, and every way a run can end -> one line and an exit code."""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pipeline.config import Settings
from pipeline.runner import Pipeline, Selection
from pipeline.settings_file import ConfigError, describe_settings, dump_settings, load_settings
from pipeline.stages.graph import NAMES
from pipeline.stages.stage import StageError
from pipeline.store import RunLock, Store, StoreError
from pipeline.store.synced import SyncedStore, is_url, working_copy
from pipeline.study.runs import StudyRun, plan, runs_of, store_of
from pipeline.telemetry import Terminal, quiet_third_parties

if TYPE_CHECKING:  # scipy is behind it
    from pipeline.study.results import Result

LEAST_FREE = 256 << 20
"""Bytes without which no run begins: what the smallest one writes, and some room."""

_DEFAULT = "tiny"
_FAILED, _USAGE, _INTERRUPTED, _TERMINATED = 1, 2, 130, 143


class _Stopped:
    """Turns SIGTERM, which `ray job stop` and cluster schedulers send, into what Ctrl-C does, and remembers which it was."""

    terminated = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True
        raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End the process, all that it has to do at its end done, but for taking down the interpreter.

    Threads of Ray's core may outlive its shutdown; in an interpreter that is taken down they crash, seldom, and a run that is whole
    would end with the exit code of that.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def main(arguments: Sequence[str]) -> int:
    """Exit code of one command: 0, 1 for a failed run, 2 for wrong arguments or settings, 130 and 143 when stopped."""
    options = _parse(arguments)
    terminal = Terminal(None)
    try:
        settings = load_settings([_config_file(name) for name in options.config or [_DEFAULT]], options.overrides)
        selection = Selection(tuple(options.only), options.first, options.last, options.force, options.first_round)
        studied = runs_of(settings, run_folder(settings)) if settings.study.variants else []
        all_settings = [one.settings for one in studied] or [settings]
        rounds = max(one.run.rounds for one in all_settings)
        if not 1 <= options.first_round <= rounds:
            raise StageError(f"--from-round must lie in 1 .. run.rounds = {rounds}, is {options.first_round}")
        for one in all_settings:
            _import_rewards(one)
            _find_trackers(one)
            _find_deepspeed(one)
    except (ConfigError, StageError) as error:
        terminal.error(str(error))
        return _USAGE
    if options.print_config:
        print(dump_settings(settings), end="")
        return 0
    folder = run_folder(settings)
    try:
        if studied:
            return _plan_study(studied, selection) if options.dry_run else _study(settings, studied, selection, terminal)
        store = open_store(settings)
        if options.dry_run:
            for step in Pipeline(settings, folder, selection, terminal, store).plan():
                print(f"round {step.round}  {step.stage:<9} {step.state:<8} {step.why}".rstrip())
            return 0
        return _run(settings, store, selection, terminal, _Stopped())
    except (StageError, StoreError) as error:
        terminal.error(str(error))
        return _FAILED


def _import_rewards(settings: Settings) -> None:
    """Rewards of the user's own are not found missing after an hour of other stages."""
    if settings.grpo.steps and settings.grpo.reward.custom:
        from rewards.combine import RewardError, Rewards

        try:
            Rewards(settings.grpo.reward)
        except RewardError as error:
            raise ConfigError(f"grpo.reward.{error}") from error


def _find_trackers(settings: Settings) -> None:
    """Nor are packages that figures go to."""
    if settings.monitor.report_to:
        from actors.watch import missing

        if line := missing(settings.monitor.report_to):
            raise ConfigError(line)


def _find_deepspeed(settings: Settings) -> None:
    """Nor is this."""
    file = settings.sft.deepspeed
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"sft.deepspeed: there is no file {file}")
    if file is not None and find_spec("deepspeed") is None:
        raise ConfigError("sft.deepspeed: the package deepspeed is not installed")


def run_folder(settings: Settings) -> Path:
    """The run's folder; of a run at a URL its working copy.

    Inside a Ray job the working folder is a copy that goes away: a relative root starts at home there.
    """
    if is_url(settings.run.root):
        return working_copy(Path(settings.run.cache).expanduser().absolute(), _url(settings))
    root = Path(settings.run.root).expanduser()
    if not root.is_absolute():
        inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        root = (Path.home() / "retract" if inside_job else Path.cwd()) / root
    return root / settings.run.name


def open_store(settings: Settings) -> Store:
    """Where the run's outputs are. Raises StoreError when a store at a URL does not answer."""
    folder = run_folder(settings)
    return SyncedStore.open(_url(settings), folder) if is_url(settings.run.root) else Store(folder)


def _url(settings: Settings) -> str:
    return f"{settings.run.root.rstrip('/')}/{settings.run.name}"


def _plan_study(runs: Sequence[StudyRun], selection: Selection) -> int:
    planned = list(plan(runs, selection))
    width = max(len(one.run) for one in planned)
    for step in planned:
        print(f"{step.run:<{width}}  round {step.round}  {step.stage:<9} {step.state:<8} {step.why}".rstrip())
    counts = Counter(step.state for step in planned)
    told = ", ".join(f"{counts[state]} to {state}" for state in ("reuse", "rebuild", "share", "skip") if counts[state])
    print(f"{len(runs)} runs, {len(planned)} outputs: {told}")
    return 0


def _study(settings: Settings, runs: Sequence[StudyRun], selection: Selection, terminal: Terminal) -> int:
    """Every run of a study, one after the other, and its page behind each; the first that fails ends it."""
    from pipeline.study.page import publish  # scipy and matplotlib are behind it

    folder, stopped = run_folder(settings), _Stopped()
    known: dict[str, Result] = {}
    since = datetime.now(UTC).isoformat(timespec="seconds") if selection.force else ""
    with RunLock(folder):
        (folder / "config.yaml").write_text(dump_settings(settings))
        signal.signal(signal.SIGTERM, stopped)
        for number, one in enumerate(runs, 1):
            terminal.info(f"study {settings.run.name}: run {number} of {len(runs)}, {one.name}")
            code = _run(one.settings, store_of(one, runs, since), selection, terminal, stopped)
            if code:
                terminal.error(f"study {settings.run.name} ends in run {number} of {len(runs)}, {one.name}")
                return code
            try:
                page = publish(settings, runs, runs[:number], known, folder)
            except KeyboardInterrupt:
                return _ended(terminal, stopped)
        terminal.info(f"study: {page}" if page else "study: no run is evaluated yet, so there is no page")
    return 0


def _ended(terminal: Terminal, stopped: _Stopped) -> int:
    word, code = ("terminated", _TERMINATED) if stopped.terminated else ("interrupted", _INTERRUPTED)
    terminal.error(f"{word}; the same command continues with the stage that was under way")
    return code


def _run(settings: Settings, store: Store, selection: Selection, waiting: Terminal, stopped: _Stopped) -> int:
    folder = store.root
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < LEAST_FREE:
        raise StoreError(f"the disk of {folder} is full: {free:,} bytes are free, {LEAST_FREE:,} are needed to begin (run.root)")
    with store.lock(waiting.info):
        log_file = folder / "logs" / "driver.log"
        log_file.parent.mkdir(exist_ok=True)
        quiet_third_parties(log_file)
        terminal = Terminal(folder / "logs" / "run.log")
        signal.signal(signal.SIGTERM, stopped)
        terminal.info(f"run {folder}" + (f", working copy of {_url(settings)}" if is_url(settings.run.root) else ""))
        pipeline = Pipeline(settings, folder, selection, terminal, store)
        try:
            lines = pipeline.run()
        except KeyboardInterrupt:
            return _ended(terminal, stopped)
        except Exception as error:
            if not _expected(error):
                raise
            terminal.error(str(error))
            return _FAILED
        terminal.summary(lines)
        for line in pipeline.rounds():
            terminal.info(line)
        report = pipeline.publish()
        if report:
            terminal.info(f"report: {report}")
    return 0


def _expected(error: Exception) -> bool:
    """Errors that say in one line what is wrong; anything else is a bug and shows its traceback."""
    from actors.cluster import ClusterError
    from actors.learner import TrainingError
    from rewards.combine import RewardError

    return isinstance(error, StageError | StoreError | ClusterError | TrainingError | RewardError)


def _config_file(name: str) -> Path:
    """A path, or the name of a file in configs/."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    return Path(__file__).resolve().parent.parent / "configs" / f"{name}.yaml"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Teach a language model to take back its own mistakes: one run, stage by stage, reusing what is up to date.",
        epilog="settings (key=default):\n" + describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = ", ".join(NAMES)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the file")
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help=f"yaml file, or the name of one in configs/ (default: {_DEFAULT}); of several, later ones win",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument("--dry-run", action="store_true", help="print what would be reused and rebuilt and end")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help=f"build this stage alone, of {stages}")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="build this stage and later ones")
    parser.add_argument("--until", dest="last", metavar="STAGE", help="build no stage after this one")
    parser.add_argument(
        "--from-round", dest="first_round", type=int, default=1, metavar="N", help="build nothing of the rounds before this one"
    )
    parser.add_argument("--force", action="store_true", help="build the selected stages even when they are up to date")
    return parser.parse_intermixed_args(arguments)
