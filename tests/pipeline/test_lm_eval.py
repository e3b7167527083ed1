"""The model class for lm-evaluation-harness beside our own evaluation and plain transformers. Needs the harness (extra lm-eval)."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm-eval)")

from lm_eval.filters import build_filter_ensemble  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from actors.lm_eval.__main__ import main  # noqa: E402
from actors.lm_eval.model import RetractLM, settled  # noqa: E402
from actors.lm_eval.problems import judged  # noqa: E402
from actors.saved import InputError  # noqa: E402
from pipeline.backtrack.cursor import Decoding  # noqa: E402
from pipeline.backtrack.undo import UndoRule, apply_undo  # noqa: E402
from pipeline.card import usage  # noqa: E402
from pipeline.config import Settings  # noqa: E402
from pipeline.config import UndoSettings as Undo  # noqa: E402
from pipeline.stages.io import Codec  # noqa: E402
from pipeline.tasks.problem import Problem, TaskError  # noqa: E402
from tests.actors.readers import STOP, UNDO, byte_level, save_model  # noqa: E402
from tests.pipeline.saved import PROBLEMS, save_problems_and_models  # noqa: E402
from tests.pipeline.test_evaluate import evaluated, settings_of  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
OURS = Path("actors/lm_eval").resolve()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lm_eval")
    return save_problems_and_models({name: folder / name for name in ("problems", "model", "sft")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture
def only_our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reads some ten thousand yamls otherwise."""
    whole = TaskManager.__init__

    def fewer(self: Any, *arguments: Any, **more: Any) -> None:
        whole(self, *arguments, **{**more, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", fewer)


def noted(model: Path, settings: Settings) -> Path:
    """The model with the note that a run leaves with it."""
    (model / "retract.json").write_text(usage(settings))
    return model


def samples(out: Path, task: str) -> dict[str, dict[str, Any]]:
    """Logged rows of a task by problem."""
    file = next(out.rglob(f"samples_{task}_*.jsonl"))
    return {row["doc"]["id"]: row for row in map(json.loads, file.read_text().splitlines())}


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=request) for request in requests]


@pytest.mark.parametrize(("unit", "mode"), [("token", "rewind"), ("step", "rewind"), ("step", "guided"), ("step", "soft")])
def test_rows_and_accuracy_are_those_of_our_own_evaluation(
    inputs: dict[str, Path], tmp_path: Path, only_our_tasks: None, monkeypatch: pytest.MonkeyPatch, unit: str, mode: str
) -> None:
    settings = settings_of(modes=[mode], unit=unit, max_tokens=60)
    rows = [row for row in evaluated(inputs, tmp_path / "rows", settings) if row["model"] == "sft" and row["split"] == "test"]
    model, codec = noted(inputs["sft"], settings), Codec(inputs["sft"], settings.undo, settings.base.prompt)
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    code = main(
        ["--model", "retract", "--model_args", f"pretrained={model}", "--tasks", "retract_run", "--batch_size", "3",
         "--metadata", f"problems={inputs['problems']}", "--log_samples", "--output_path", str(tmp_path / "out")],
        io.StringIO(),
    )  # fmt: skip
    assert code == 0
    found = samples(tmp_path / "out", "retract_run")
    assert sorted(found) == sorted(row["problem"] for row in rows)
    for row in rows:
        one = found[row["problem"]]
        surviving = apply_undo(row["token_ids"], codec.rule).surviving
        assert one["resps"] == [[codec.decode(surviving).text]]
        assert one["accuracy"] == row["correct"]
        assert codec.encode(one["arguments"]["gen_args_0"]["arg_0"]) == codec.prompt_ids(
            next(problem for problem in PROBLEMS if problem.id == row["problem"])
        )
    assert sum(row["undos"] > 0 for row in rows) > 1
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["results"]["retract_run"]["accuracy,none"] == sum(row["correct"] for row in rows) / len(rows)
    assert results["config"]["retract"]["mode"] == mode


def test_the_filter_of_the_harness_agrees_with_our_verdict() -> None:
    """The harness's own gsm8k reads the last line of our models' answers as we do."""
    from lm_eval.tasks._yaml_loader import load_yaml

    answers = ["18", "1,080", "-3", "2.5", "70000"]
    stock = load_yaml(str(TASKS / "gsm8k" / "gsm8k.yaml"), resolve_func=False)
    strict = next(one for one in stock["filter_list"] if one["name"] == "strict-match")
    steps = [[one.pop("function"), one or None] for one in strict["filter"]]
    metric = stock["metric_list"][0]
    exact = lm_eval.api.registry.get_metric("exact_match")
    how = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    right = 0
    for answer in answers:
        solution = f"It is <<1+1=2>>.\n#### {answer}"
        problem = Problem("gsm8k/test/0", "test", "gsm8k", False, "How many?", solution, answer.replace(",", ""))
        document = {**asdict(problem), "prompt": ""}
        for said in answers:
            text = f"<<1+1=2>>\n#### {said}"
            instance = SimpleNamespace(resps=[text], filtered_resps={}, doc=document)
            build_filter_ensemble("strict-match", steps).apply([instance])
            taken = instance.filtered_resps["strict-match"]
            theirs = exact(predictions=[taken], references=[document["solution"]], **how)["exact_match"]
            assert judged(document, [text])["accuracy"] == theirs, (said, document["answer"])
            right += int(theirs)
    assert right == len(answers)


@pytest.mark.parametrize("mode", ["rewind", "soft", "forbidden"])
@pytest.mark.parametrize("unit", ["token", "step", "all"])
def test_a_stop_string_cuts_the_surviving_text_and_ends_the_decode(
    folder: Path, unit: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RetractLM(str(folder), 4, mode=mode, unit=unit, threshold=0.01, max_tokens=96, max_undos=3)
    prompts = [f"{word} b?" for word in ("a", "ab", "b", "aab", "bb", "abab")]
    whole = model.generate_until(asked(*[(prompt, {"until": []}) for prompt in prompts]), True)
    stops = [text[len(text) // 2 :][:1] for text in whole]
    assert sum(map(bool, stops)) > 2
    looked: list[int] = []
    monkeypatch.setattr("actors.lm_eval.model.settled", lambda ids, how: looked.append(len(ids)) or settled(ids, how))
    cut = model.generate_until(asked(*[(prompt, {"until": [stop, ""]}) for prompt, stop in zip(prompts, stops, strict=True)]), True)
    assert cut == [text[: text.find(stop)] if stop else text for text, stop in zip(whole, stops, strict=True)]
    assert looked and (mode != "forbidden" or max(looked) < 96 - 8)  # nothing is taken back there, so no row runs on


def test_special_tokens_end_an_answer_where_a_task_names_them(folder: Path) -> None:
    model = RetractLM(str(folder), 4)
    ids = [*model.tok_encode("ab"), *model.tokenizer.convert_tokens_to_ids([STOP]), *model.tok_encode("b")]
    assert model._read(ids, ()) == "ab"
    model._saved = SimpleNamespace(stop_id=-1, settings=model._saved.settings)
    assert model._read(ids, ()) == f"ab{STOP}b" and model._read(ids, (STOP,)) == "ab"


def test_what_is_settled_survives_all_that_can_follow() -> None:
    generator = torch.Generator().manual_seed(0)
    for unit in ("token", "step", "all"):
        rule = UndoRule(7, unit, frozenset({3}))  # type: ignore[arg-type]
        for mode in ("rewind", "forbidden"):
            decoding = Decoding(mode, 0, 1, 12, 0, rule, max_undos=3)  # type: ignore[arg-type]
            for _ in range(300):
                row = torch.randint(1, 7 if mode == "forbidden" else 8, (12,), generator=generator).tolist()
                while row.count(7) > 3:
                    row.remove(7)
                final = apply_undo(row, rule).surviving
                for length in range(len(row) + 1):
                    one = settled(row[:length], decoding)
                    assert final[: len(one)] == one
                    if mode == "forbidden":
                        assert one == tuple(row[:length])


def plain_logprob(model: Any, ids: Sequence[int], start: int, banned: Sequence[int]) -> tuple[float, bool]:
    """One id after the other, without the banned ids."""
    total, greedy = 0.0, True
    for place in range(start, len(ids)):
        probs = model(torch.tensor([ids[:place]])).logits[0, -1].double().softmax(-1)
        probs[list(banned)] = 0
        total += float(torch.log(probs[ids[place]] / probs.sum()))
        greedy &= int(probs.argmax()) == ids[place]
    return total, greedy


@torch.no_grad()
def test_loglikelihoods_are_those_of_plain_transformers_without_undo(folder: Path) -> None:
    model, plain = RetractLM(str(folder), 3), AutoModelForCausalLM.from_pretrained(folder)
    undo_id = model.tokenizer.convert_tokens_to_ids(UNDO)
    best = model.generate_until(asked(("a b?", {"until": [], "max_gen_toks": 3})), True)[0]
    pairs = [("a b?", " ab"), ("a b?", "b"), ("a ", "a b"), ("", "ab a"), ("a longer prompt, a b", "\nab ab b"), ("b", "a" * 9)]
    found = model.loglikelihood(asked(*pairs, ("a b?", best)), True)
    for (context, continuation), one in zip([*pairs, ("a b?", best)], found, strict=True):
        given, wanted = model._encode_pair(context, continuation) if context else ([model.eot_token_id], model.tok_encode("ab a"))
        logprob, greedy = plain_logprob(plain, [*given, *wanted], len(given), [undo_id])
        assert one == (pytest.approx(logprob, abs=1e-3), greedy)
    kept = sum(plain_logprob(plain, model.tok_encode("a b? ab"), 4, [])[:1])
    assert found[0][0] > kept  # undo's own share went to the others
    assert not found[0][1]
    texts = ["ab a b", "a", "b " * 700]
    window = model.max_length
    for text, one in zip(texts, model.loglikelihood_rolling(asked(*[(text,) for text in texts]), True), strict=True):
        ids = [model.prefix_token_id, *model.tok_encode(text)]
        total = 0.0
        if len(ids) <= window + 1:
            total = plain_logprob(plain, ids, 1, [undo_id])[0]
        else:  # full windows; the last one begins earlier, so that it is full too
            for start in range(1, len(ids), window):
                end = min(start + window, len(ids))
                rows = torch.tensor([ids[max(0, end - 1 - window) : end - 1]])
                logits = plain(rows).logits[0].double()
                logits[:, undo_id] = -torch.inf
                logprobs = logits.log_softmax(-1)[-(end - start) :]
                total += float(logprobs[range(end - start), ids[start:end]].sum())
        assert one == pytest.approx(total, rel=1e-4, abs=1e-3)


def test_tasks_say_how_to_decode_before_the_folder_does(folder: Path) -> None:
    model = RetractLM(str(folder), "auto", threshold=0.01, temperature=0.8, max_tokens=20)

    def how(**given: Any) -> tuple[float, float, int]:
        decoding = model._planned("a", given).decoding
        return decoding.temperature, decoding.top_p, decoding.max_tokens

    assert how() == (0.8, 1.0, 20)
    assert how(do_sample=False, temperature=0.7) == (0.0, 1.0, 20)
    assert how(do_sample=True, top_p=0.9, max_gen_toks=7, max_tokens=9) == (0.8, 0.9, 7)
    assert how(temperature=0.0, top_k=0, num_beams=1) == (0.0, 1.0, 20)
    assert how(temperature=1.2, max_new_tokens=30) == (1.2, 1.0, 30)
    prompts = [("a b?", {"until": []})] * 6
    torch.manual_seed(1)
    first = model.generate_until(asked(*prompts), True)
    assert len(set(first)) > 1  # repeats are different samples
    assert model.generate_until(asked(*prompts), True) != first
    torch.manual_seed(1)
    assert model.generate_until(asked(*prompts), True) == first


def test_long_prompts_are_cut_on_the_left(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = RetractLM(str(folder), 1, max_tokens=12)
    plan = model._planned("a" * 700 + " b", {})
    assert len(plan.prompt_ids) == model.max_length - 12 and plan.prompt_ids[-2:] == tuple(model.tok_encode(" b"))
    assert "cut on the left" in caplog.text


def test_a_chat_template_brings_its_special_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + STOP + "{% endfor %}"
    save_model(tmp_path, tokenizer)
    model = RetractLM(str(tmp_path), 1)
    text = model.apply_chat_template([{"role": "user", "content": "ab"}])
    assert text == f"ab{STOP}"
    assert model.tok_encode(text) == [*tokenizer("ab").input_ids, tokenizer.eos_token_id]
    model.chat_template(False)
    assert tokenizer.eos_token_id not in model.tok_encode(text)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pretrained": None}, "must name a model folder"),
    ({"pretrained": "/nowhere"}, "/nowhere is no model folder"),
    ({"mode": "guess"}, "mode: "),
    ({"threshold": 2}, "threshold: "),
    ({"undo_token": "<|NONE|>"}, "<|NONE|>"),
    ({"dtype": "float16"}, "knows no dtype"),
    ({"batch_size": 0}, "batch_size must be"),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=str)
def test_what_cannot_be_loaded_is_said_in_one_line(folder: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        RetractLM(**{"pretrained": str(folder)} | given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


ASKED: list[tuple[str, dict[str, Any], str]] = [
    ("a", {"top_k": 50}, "top_k=50 cannot be done with undo"),
    ("a", {"num_beams": 4}, "num_beams=4"),
    ("a", {"do_sample": True, "temperature": 0.0}, "above 0"),
    ("a", {"temperature": 9.0}, "temperature: "),
    ("a", {"max_gen_toks": 512}, "512"),
    ("", {}, "empty"),
    (f"a {UNDO}", {}, "undo token"),
]


@pytest.mark.parametrize(("context", "given", "said"), ASKED, ids=str)
def test_what_cannot_be_decoded_is_said_in_one_line(folder: Path, context: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        RetractLM(str(folder)).generate_until(asked((context, given)), True)
    assert said in str(caught.value) and "\n" not in str(caught.value)


MISSING: list[tuple[str, list[str], str]] = [
    ("retract_run", [], "needs the problems of a run"),
    ("retract_run", ["--metadata", "problems=/nowhere"], "/nowhere holds no problems"),
    ("retract_gsm8k", ["--metadata", "test_file=/nowhere.jsonl"], "cannot read /nowhere.jsonl"),
    ("retract_run", ["--apply_chat_template"], "has no chat template"),
]


@pytest.mark.parametrize(("task", "more", "said"), MISSING, ids=str)
def test_the_command_says_in_one_line_what_is_missing(
    folder: Path, inputs: dict[str, Path], task: str, more: list[str], said: str,
    only_our_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["lm_eval"])
    more = more + (["--metadata", f"problems={inputs['problems']}"] if "--apply_chat_template" in more else [])
    err = io.StringIO()
    assert main(["--model", "retract", "--model_args", f"pretrained={folder}", "--tasks", task, *more], err) == 2
    assert err.getvalue().count("\n") == 1 and said in err.getvalue()


def test_few_shot_examples_stand_in_our_format(inputs: dict[str, Path]) -> None:
    manager = TaskManager(
        include_path=str(OURS), include_defaults=False,
        metadata={"pretrained": str(inputs["sft"]), "problems": str(inputs["problems"])},
    )  # fmt: skip
    task = manager.load(["retract_run"])["tasks"]["retract_run"]
    task.set_fewshot_seed(0)
    document = task.test_docs()[0]
    text = task.fewshot_context(document, 2)
    shots = {f"{one.question}\n{one.solution}\n\n" for one in PROBLEMS if one.split == "train"}
    start = text.removesuffix(document["prompt"])
    assert start != text and any(start == one + two for one in shots for two in shots)
    metadata = {"problems": str(inputs["problems"]), "split": "x"}
    with pytest.raises(TaskError, match="split must be one of"):
        TaskManager(include_path=str(OURS), include_defaults=False, metadata=metadata).load(["retract_run"])


def test_the_undo_token_may_have_another_name(tmp_path: Path) -> None:
    save_model(tmp_path, byte_level("<U>"))
    with pytest.raises(InputError, match="undo"):
        RetractLM(str(tmp_path))
    assert RetractLM(str(tmp_path), undo_token="<U>", unit="all")._saved.rule.unit == "all"
    assert Undo().token == UNDO
