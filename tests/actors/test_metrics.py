"""What is watched, on a real Ray: figures at the endpoint that Prometheus reads, names on the dashboard's pages, the Grafana
dashboard's metrics; and without Ray: busy shares, curves, trackers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util import state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors import metrics
from actors.engines import Request, Sampling
from actors.judge import judge_all
from actors.learner import Curve
from actors.metrics import TABLE, Busy, Labels
from actors.watch import Watch
from actors.workers import Workers
from pipeline.cli import main
from pipeline.config import Settings
from pipeline.rollout_log import Rolled, RolloutLog
from pipeline.telemetry import Terminal
from tests.pipeline.saved import PROBLEMS, save_problems_and_models

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"cpus": 0.1, "threads": 1}
SETTINGS = Settings.model_validate(
    {
        "run": {"name": "watched"},
        "engine": {"kind": "hf", "max_num_seqs": 4},
        "cluster": {"rollout_actors": 2, "rollout": SMALL, "learner": SMALL, "judge": SMALL},
    }
)


def scraped() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(metric, its own labels) -> value, summed over processes, as one node's agent gives them to Prometheus."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30).read().decode()
    own = {tag for metric in TABLE.values() for tag in metric.tags}
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for name, labels, value in re.findall(r"^(ray_retract_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        kept = tuple(sorted((tag, said) for tag, said in re.findall(r'(\w+)="([^"]*)"', labels) if tag in own))
        found[name, kept] = found.get((name, kept), 0.0) + float(value)
    return found


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's value as soon as it is true; Ray's agents report every few seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def test_a_run_is_seen_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = save_problems_and_models({name: tmp_path / name for name in ("problems", "model")})
    with Workers(SETTINGS, tmp_path / "logs", lambda line: None) as workers:
        workers.start()
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)  # of this Ray, should others run here too
        metrics.begin(Labels("watched", "rollouts", 1))
        terminal = Terminal(None, out=open("/dev/null", "w"))  # noqa: SIM115
        terminal.on_progress = metrics.progressed
        pool = workers.pool(folders["model"], "grpo@7", 64)
        requests = [Request((5, 6, 7), seed) for seed in range(6)]
        made, version = pool.generate(requests, Sampling(1.0, 1.0, 8, 0), 2)
        with terminal.stage("rollouts", 6) as progress:
            progress.update(6)
        log = RolloutLog(tmp_path / "logs", "rollouts", 1, on_rows=metrics.rolled)
        log.write([
            Rolled(str(i), "p", one.token_ids, one.finish, version, "rewind", 1, i % 2, correct=i < 2, components={"outcome": 0.5})
            for i, one in enumerate(made)
        ])  # fmt: skip
        assert sum(map(len, judge_all([(PROBLEMS[0], "1")] * 4, 4, 2, SETTINGS.cluster.judge, 1))) == 4
        workers.watch("grpo", 0).write({"step": 7, "reward": 0.25, "components": {"outcome": {"mean": 0.5}}})
        tokens = sum(len(one.token_ids) for one in made)
        here = (("run", "watched"), ("stage", "rollouts"))

        def labels(**tags: str) -> tuple[tuple[str, str], ...]:
            return tuple(sorted((*here, *tags.items())))

        def training(figure: str) -> tuple[tuple[str, str], ...]:
            return (("figure", figure), ("run", "watched"), ("training", "grpo-1"))

        wanted = {
            ("ray_retract_rows_total", labels(unit="rows")): 6,
            ("ray_retract_tokens_total", labels(method="generate")): tokens,
            ("ray_retract_queue_depth", labels(queue="rollout")): 0,
            ("ray_retract_queue_depth", labels(queue="judge")): 0,
            ("ray_retract_weight_step", here[:1]): 7,
            ("ray_retract_weight_version", (here[0], ("version", "grpo@7"))): 1,
            ("ray_retract_rollouts_total", labels(mode="rewind")): 6,
            ("ray_retract_undo_rate", labels(mode="rewind")): 0.5,
            ("ray_retract_accuracy", labels(mode="rewind")): pytest.approx(1 / 3),
            ("ray_retract_reward", labels(component="outcome")): 0.5,
            ("ray_retract_training", training("reward")): 0.25,
            ("ray_retract_training", training("components.outcome.mean")): 0.5,
        }
        # Names on the dashboard's pages; numbers go on where this process has had actors before.
        names = [one.name for one in state.list_actors(filters=[("state", "=", "ALIVE")])]
        assert len(names) == 2 and all(re.fullmatch(r"watched/rollout-\d+", name) for name in names)
        busy = [("ray_retract_busy_share", (("actor", name), here[0])) for name in names]
        assert until(lambda: {*wanted, *busy} <= (found := scraped()).keys() and found), scraped()
        found = scraped()
        assert {key: found[key] for key in wanted} == wanted
        assert all(0 <= found[key] <= 1 for key in busy)

        seen = {"watched/rollouts.generate", "watched/rollouts.judge"}
        assert until(lambda: seen <= {one.name for one in state.list_tasks(limit=1000)})


def test_every_panel_asks_for_what_is_exported() -> None:
    board = json.loads((REPOSITORY / "configs" / "cluster" / "grafana.json").read_text())
    exported = {metric.exported: metric for metric in TABLE.values()}
    shown = set()
    for panel in board["panels"]:
        assert panel["targets"] and panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            for name, inside in re.findall(r"(ray_\w+)\{([^}]*)\}", target["expr"]):
                shown.add(name)
                asked = {*re.findall(r"(\w+)=~", inside)}
                for by in re.findall(r"by \(([^)]*)\)", target["expr"]):
                    asked |= {*re.findall(r"\w+", by)}
                asked |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                assert asked <= {*exported[name].tags, "SessionName"}, target["expr"]
            assert re.findall(r"ray_\w+", target["expr"]) and target["expr"].count("(") == target["expr"].count(")")
    assert shown == exported.keys()  # nothing is exported that nobody sees
    # What Grafana's provisioning needs, and every variable that is used.
    assert board["uid"] and board["title"] and board["schemaVersion"] and "id" not in board
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {one["name"] for one in board["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?([A-Za-z_]+)", json.dumps(board))) - {"__all"} <= variables


def test_the_table_is_documented() -> None:
    text = (REPOSITORY / "docs" / "monitoring.md").read_text()
    for metric in TABLE.values():
        assert f"| `{metric.exported}` | {metric.unit} | {', '.join(metric.tags)} | {metric.what} |" in text


def test_a_metric_never_fails_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    metrics.count("no_such_metric", 1)
    metrics.gauge("training", float("nan"), wrong="tag")


def test_busy_share_of_a_long_and_of_a_short_batch() -> None:
    now = [0.0]
    busy = Busy(lambda: now[0])
    with busy.work():
        now[0] = 2.0
    now[0] = 8.0
    assert busy.share() == 0.25
    with busy.work():
        now[0] = 10.0
        assert busy.share() == 1.0  # asked from another thread while the batch goes on
        now[0] = 11.0
    now[0] = 14.0
    assert busy.share() == 0.25
    assert busy.share() == 0.0


def test_points_of_a_curve_are_written_once(tmp_path: Path) -> None:
    curve = Curve(losses=[(1, 2.0)])
    with Watch(tmp_path, "sft/control-1") as watch:
        watch.curve(curve)
        curve.losses.append((2, 1.5))
        curve.checks.append((2, 0.75))
        watch.curve(curve)
        watch.curve(curve)
    lines = [json.loads(line) for line in (tmp_path / "sft-control-1.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "dev_accuracy": 0.75}]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft-control-1"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert [(one.step, one.value) for one in events.Scalars("dev_accuracy")] == [(2, 0.75)]


def test_figures_are_handed_to_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Stand-ins: the hand-over alone is tested, of one that works and one that fails."""
    calls: list[Any] = []

    def log(figures: dict[str, float], step: int) -> None:
        calls.append((step, figures))

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no answer")

    wandb = SimpleNamespace(__name__="wandb", init=lambda **given: calls.append(given), log=log, finish=lambda: calls.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(__name__="trackio", init=lambda **_: None, log=fail, finish=fail))
    metrics.begin(Labels("tiny", "grpo", 1))
    with Watch(tmp_path, "grpo-1", report_to=("wandb", "trackio")) as watch:
        watch.write({"step": 3, "components": {"outcome": {"mean": 0.5}}})
        watch.write({"step": 4, "reward": 1.0})
    given = {"project": "retract", "name": "tiny/grpo-1"}
    assert calls == [given, (3, {"components.outcome.mean": 0.5}), (4, {"reward": 1.0}), "end"]
    assert [one.getMessage() for one in caplog.records] == ["grpo-1 is not reported to trackio any more: no answer"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("monitor.report_to=[wandb]", "monitor.report_to: wandb is not installed: .venv/bin/python -m pip install wandb"),
        ("monitor.report_to=[mlflow]", "monitor.report_to"),
        ("monitor.report_to=[wandb,wandb]", "names one twice"),
        ("monitor.rollout_mib=0", "monitor.rollout_mib"),
    ],
)
def test_a_wrong_setting_is_one_line(
    setting: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    assert main([setting]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
