"""The pages of a run: what the library reads, what the server answers, what a browser makes of it, what an export holds."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from markupsafe import escape

from pipeline.backtrack.undo import apply_undo
from pipeline.config import UndoSettings
from pipeline.report import number as number_text
from pipeline.stages.io import read_rows
from pipeline.store import Store, StoreError
from pipeline.view.__main__ import main
from pipeline.view.application import Shelf, application
from pipeline.view.filters import PAGE_ROWS, Filters, Selection
from pipeline.view.library import Library, Place
from pipeline.view.models import Doubts
from tests.pipeline.browser import Browser
from tests.pipeline.saved import PROBLEMS
from tests.pipeline.viewed import HOSTILE, QUERY, make_run


class Running:
    """A server in a thread of the test, on a free port."""

    def __init__(self, store: Store) -> None:
        app = application(Shelf(store), Doubts(store), store.root.name)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def get(self, path: str, status: int = 200, **headers: str) -> str:
        answer = self.client.get(path, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("view")
    return make_run(root / "made", root / "models")


@pytest.fixture(scope="module")
def library(store: Store) -> Library:
    return Library(store)


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[Running]:
    running = Running(store)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def chosen(library: Library, **query: str) -> list[int]:
    found: list[int] = Selection(library.table, Filters.parse(query, library.table), library.search).rows.tolist()
    return found


def test_the_table_says_what_the_datasets_hold(store: Store, library: Library) -> None:
    tries, verdicts, evaluated = (read_rows(store.path(1, name)) for name in ("rollouts", "judge", "evaluate"))
    problems = {one.id: one for one in PROBLEMS}
    rows = [
        {"stage": "rollouts", "model": "base", "mode": "forbidden", "temperature": "1", "correct": verdict["correct"]} | row
        for row, verdict in zip(tries, verdicts, strict=True)
    ] + [{"stage": "evaluate"} | row | {"temperature": f"{row['temperature']:g}"} for row in evaluated]
    assert len(library.table) == len(rows) and not library.notes
    for number, row in enumerate(rows):
        shown, problem = library.rollout(number), problems[row["problem"]]
        undone = apply_undo(row["token_ids"], library.codec(UndoSettings(**QUERY["undo"]), QUERY["prompt"]).rule)
        wanted = {name: row[name] for name in ("stage", "model", "mode", "temperature", "finish")} | {
            "round": "1", "split": problem.split, "family": problem.family, "verdict": "right" if row["correct"] else "wrong",
        }  # fmt: skip
        assert wanted.items() <= shown.facets.items()
        assert (shown.problem.id, shown.undos, shown.tokens) == (problem.id, undone.undos, len(row["token_ids"]))
        assert (library.table.undos[number], library.table.tokens[number]) == (shown.undos, shown.tokens)
        assert library.number(shown.place) == number
    assert library.number(Place(1, "evaluate", len(evaluated))) is None and library.number(Place(2, "evaluate", 0)) is None


def test_text_is_found_in_questions_and_ids(library: Library) -> None:
    problem = PROBLEMS[0]
    found = chosen(library, text=HOSTILE[:8].upper())
    assert found and {library.rollout(number).problem.id for number in found} == {problem.id}
    assert set(chosen(library, text=problem.id)) >= set(found) and not chosen(library, text="no such words (")


def test_a_list_has_what_fits_and_leads_to_it(server: Running, library: Library) -> None:
    wanted = chosen(library, verdict="wrong", undos_from="1")
    page = server.get("/?verdict=wrong&undos_from=1&text=")
    links = re.findall(r'<h2><a href="(/rollout/[^"]*)"', page)
    assert len(links) == min(len(wanted), PAGE_ROWS) > 0 and f"of {len(wanted)}</b>" in page and page.count("<del") >= len(links)
    assert all("verdict=wrong&amp;undos_from=1" in link for link in links)
    one = server.get(links[0].replace("&amp;", "&"))
    assert f"1 of {len(wanted)}" in one and 'rel="next"' in one and 'rel="prev"' not in one
    assert "What survives" in one and "undo tokens spelled out" in one


def test_what_a_model_wrote_stays_text(server: Running, library: Library) -> None:
    number = chosen(library, undos_from="2", model="sft")[0]
    place = library.rollout(number).place
    for path in ("/", "/rollout/1/rollouts/0", f"/rollout/1/evaluate/{place.at}?p_undo=1", "/tree/1/0"):
        page = server.get(path)
        assert page.count("<script") == 1 and "<img" not in page and "\u202e" not in page and "&lt;script" in page


def test_p_undo_is_asked_of_the_model_that_wrote(server: Running, store: Store, library: Library) -> None:
    doubts, found = Doubts(store), {}
    for model, folder in {"base": "0/base", "sft": "1/sft", "clean_control": "1/sft/control"}.items():
        number = chosen(library, model=model, stage="evaluate")[0]
        ask = library.ask(number)
        assert ask and ask.folder == store.root / folder and len(ask.ids) == len(library.rollout(number).token_texts)
        found[model] = doubts.of(ask)
        assert all(0 <= p <= 1 for p in found[model])
        page = server.get(f"/rollout/1/evaluate/{library.rollout(number).place.at}?p_undo=1")
        assert f"<td>{escape(number_text(max(found[model]), 3))}</td>" in page and 'id="doubt"' in page
    assert found["base"] != found["clean_control"]
    assert library.ask(0) is not None and len(doubts.of(library.ask(0))) > 0  # type: ignore[arg-type]


def test_a_tree_has_its_values(server: Running, library: Library) -> None:
    tree = library.tree(1, 0)
    assert [step.samples for step in tree.steps] == [3, 0, 3, 0] and tree.steps[2].q == pytest.approx(0.9)
    page = server.get("/tree/1/0")
    assert "↩ 1" in page and page.count('class="verdict">right') == page.count('class="verdict">wrong') == 1
    assert '/tree/1/0"' in server.get("/trees")


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/?verdict=maybe", 400, "verdict=&#39;maybe&#39;: allowed here are wrong, right"),
        ("/?nothing=1", 400, "no such filter"),
        ("/trees?page=x", 400, "must be a whole number"),
        ("/rollout/1/evaluate/0?p_undo=yes", 400, "allowed are 0 and 1"),
        ("/rollout/1/evaluate/99999", 404, "There is no rollout 99999"),
        ("/rollout/1/..%2f..%2f0%2fproblems/0", 404, "There is no such page"),
        ("/rollout/1/problems/0", 404, "There is no rollout"),
        ("/tree/7/0", 404, "There is no search tree"),
        ("/manifest.json", 404, "There is no such page"),
    ],
)
def test_what_is_not_there_is_said(server: Running, path: str, status: int, said: str) -> None:
    assert said in server.get(path, status)


def test_a_strict_policy_and_no_strangers(server: Running) -> None:
    answer = server.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and not re.search(r' (style|on\w+)="', answer.text)
    assert "://" not in answer.text
    server.get("/", 400, Host="evil.example")
    server.get("/", 400, Host="127.0.0.1.evil.example:80")
    server.get("/", 200, Host="localhost:1")
    assert server.client.post("/").status_code == 405


def test_a_browser_filters_and_opens_a_rollout(server: Running, browser: Browser, library: Library) -> None:
    wanted = chosen(library, verdict="right", model="sft", undos_from="1")
    browser.size(1280, 800)
    browser.go(server.url)
    assert browser.js("document.title") == "Rollouts · made"
    browser.js(
        "for (const [name, value] of [['verdict', 'right'], ['model', 'sft'], ['undos_from', '1']])"
        " document.querySelector(`[name=${name}]`).value = value"
    )
    browser.click(".filters button[type=submit]")
    assert browser.js("location.search") == "?model=sft&verdict=right&undos_from=1"  # nothing for the empty fields
    assert browser.js("document.querySelectorAll('article.right').length") == min(len(wanted), PAGE_ROWS)
    browser.click("article h2 a")
    gone = "getComputedStyle(document.querySelector('.written del'))"
    assert "line-through" in browser.js(f"{gone}.textDecorationLine")
    struck = browser.js("[...document.querySelectorAll('.beside del')].map(one => one.textContent)")
    assert struck == [piece.text for piece in library.rollout(wanted[0]).pieces if piece.kind == "deleted"] != []
    surviving = browser.js("document.querySelector('.surviving').textContent")
    assert surviving == library.rollout(wanted[0]).surviving
    browser.click("a.ask")
    assert browser.js("document.querySelectorAll('.shaded > *').length") == len(library.rollout(wanted[0]).token_texts)
    browser.js("window.left = true; document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
    browser.loaded()
    assert f"2 of {len(wanted)}" in browser.js("document.body.innerText")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_has_room_for_it(server: Running, browser: Browser, dark: bool) -> None:
    browser.size(390, 800, dark)
    for path in ("/", "/rollout/1/evaluate/70?p_undo=1", "/tree/1/0", "/trees"):
        browser.go(server.url + path)
        assert browser.js("document.documentElement.scrollWidth <= innerWidth"), path
    browser.go(server.url)
    assert browser.js("document.querySelector('.filters details').open") is False
    light = sum(map(int, re.findall(r"\d+", browser.js("getComputedStyle(document.body).backgroundColor"))[:3])) > 384
    assert light is not dark


def exported(store: Store, folder: Path) -> Path:
    assert main([str(store.root), "--export", str(folder), "--where", "model=sft", "--most", "20", "--p-undo"]) == 0
    return folder / "rollouts.html"


def test_an_export_holds_what_was_asked_for(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html = exported(store, tmp_path).read_text()
    assert "20 of 32 rollouts" in capsys.readouterr().out
    assert html.count("<article") == 20 == html.count('class="doubt"') == html.count('data-model="sft"') and "↩ 1" in html
    assert "<img" not in html and html.count("<script") == 1 and "://" not in html and not re.search(r' (style|on\w+)="', html)
    assert re.search(r'http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;; style-src &#39;sha256-', html)


def test_an_export_works_from_a_disk(store: Store, browser: Browser, tmp_path: Path) -> None:
    file = exported(store, tmp_path)
    html = file.read_text()
    browser.size(1280, 800)
    browser.go(file.as_uri())
    assert browser.js("document.title") == "Rollouts · made"
    right = html.count('data-verdict="right"')
    browser.js("document.querySelector('[name=verdict]').value = 'right'")
    browser.js("document.querySelector('[name=verdict]').dispatchEvent(new Event('input', {bubbles: true}))")
    seen = "[...document.querySelectorAll('article')].filter(one => one.getBoundingClientRect().height).length"
    assert browser.js(seen) == right and browser.js("document.querySelector('#count').textContent") == str(right)
    browser.js("document.querySelector('article:not([hidden]) summary').click()")
    assert browser.js("document.querySelector('article:not([hidden]) .written').getBoundingClientRect().height") > 0


def test_a_damaged_output_is_named_and_left_out(store: Store, tmp_path: Path) -> None:
    copy = Store(tmp_path / "copy")
    shutil.copytree(store.root, copy.root)
    data = next(copy.path(1, "rollouts").glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-8] + b"damaged!")
    library = Library(copy)
    assert set(library.table.facets["stage"].values) == {"evaluate"} and "rollouts is left out" in library.notes[0]
    shutil.rmtree(copy.path(1, "evaluate"))
    with pytest.raises(StoreError, match=r"holds no rollouts.*damaged"):
        Library(copy)


def test_an_output_that_comes_later_is_shown(store: Store, tmp_path: Path) -> None:
    copy = Store(tmp_path / "copy")
    shutil.copytree(store.root, copy.root)
    shutil.move(copy.path(1, "evaluate"), tmp_path / "aside")
    shelf = Shelf(copy)
    assert shelf.library().table.facets["stage"].values == ("rollouts",)
    shutil.move(tmp_path / "aside", copy.path(1, "evaluate"))
    assert set(shelf.library().table.facets["stage"].values) == {"rollouts", "evaluate"}


def test_logged_rollouts_have_rewards(store: Store, tmp_path: Path) -> None:
    copy = Store(tmp_path / "copy")
    shutil.copytree(store.root, copy.root)
    folder = copy.root / "logs" / "rollouts"
    folder.mkdir(parents=True)
    codec = Library(store).codec(UndoSettings(**QUERY["undo"]), QUERY["prompt"])
    ids = [*codec.encode("no\n"), codec.rule.undo_id, *codec.encode("yes")]
    row: dict[str, Any] = {
        "format": 1, "at": 1.5, "stage": "grpo", "round": 1, "step": 3, "id": "a", "problem": PROBLEMS[0].id, "model": None,
        "version": "v", "mode": "rewind", "temperature": 1.0, "finish": "stop", "undos": 1, "correct": True, "reward": 0.75,
        "components": {"answer": 1.0, "undo": -0.25}, "token_ids": ids, "logprobs": [],
    }  # fmt: skip
    older = [row | {"id": "b", "reward": -1.0, "correct": None}, row | {"reward": 9.0}]
    (folder / "grpo-1.jsonl.1").write_text("".join(f"{json.dumps(one)}\n" for one in older))
    bad = [json.dumps(row | {"id": "c", "token_ids": ["x"]}), "[1]", json.dumps(row | {"id": "d", "step": "x"})]
    (folder / "grpo-1.jsonl").write_text("\n".join([json.dumps(row), *bad, '{"id": "half']))
    settings = {"key": "k", "settings": QUERY, "inputs": {}, "seed": 0}
    with copy.write(1, "grpo", **settings) as draft:
        draft.counts["rows"] = 2
    library = Library(copy)
    assert library.notes == ["round 1: 4 lines logged by grpo are no rollouts and are left out"]
    found = chosen(library, stage="grpo", order="high")
    assert [library.rollout(number).reward for number in found] == [0.75, -1.0]
    one = library.rollout(found[0])
    assert (one.facets["verdict"], one.step, one.undos, one.surviving) == ("right", 3, 1, "yes")
    assert one.components == (("answer", 1.0), ("undo", -0.25)) and library.ask(found[0]) is None
    assert chosen(library, reward_from="0") == found[:1] and chosen(library, reward_to="0", undos_from="1") == found[1:]
    running = Running(copy)
    try:
        page = running.get("/rollout/1/grpo/1?reward_to=0")
        page += running.get(f"/rollout/1/grpo/{one.place.at}")
    finally:
        running.stop()
    assert "+0.750" in page and '<th scope="row">undo</th><td>−0.250</td>' in page and "is not in the run any more" in page


def test_what_the_command_cannot_do(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: Any) -> tuple[int, str]:
        try:
            code = main([str(one) for one in arguments])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        return code, err

    assert said(tmp_path / "none") == (2, f"error: there is no folder {tmp_path / 'none'}\n")
    assert said(tmp_path) == (2, f"error: {tmp_path} is no run folder: it holds no rounds\n")
    (tmp_path / "1").mkdir()
    code, line = said(tmp_path, "--export", tmp_path / "x.html")
    assert code == 1 and "problems" in line and not (tmp_path / "x.html").exists()
    code, line = said(store.root, "--export", tmp_path / "x.html", "--where", "verdict=odd")
    assert code == 2 and "--where verdict='odd': allowed here are wrong, right" in line
    assert said(store.root, "--where", "verdict")[0] == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, line = said(store.root, "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen at 127.0.0.1" in line and "--port 0" in line
