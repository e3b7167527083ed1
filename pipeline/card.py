"""The model card of a run's model: what it is, what was trained on what, how it was measured. Knows no files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import Settings

GROUPS = ("all", "hindsight", "forward")


def usage(settings: Settings) -> str:
    """`retract.json`: what a decoder has to know of the model, beside the weights; actors/saved.py reads it."""
    undo, asked = settings.undo, settings.evaluate
    found = {"undo_token": undo.token, "unit": undo.unit, "prompt": settings.base.prompt, "temperature": asked.temperature}
    found |= {"mode": asked.modes[0], "top_p": asked.top_p, "max_tokens": asked.max_tokens}
    found |= settings.decode.model_dump()
    if asked.modes[0] == "soft":  # measured by an ordinary engine, to which the undo token is a token like any other
        found |= {"threshold": None, "undo_bias": 0.0, "ban_tried": False}
    return json.dumps(found, indent=1) + "\n"


def model_card(settings: Settings, metrics: Mapping[str, Any], model: str) -> str:
    """The card as markdown.

    Args:
        metrics: as the report stage gathers them.
        model: name of the exported model among the metrics: `sft`, `dpo` or `grpo`, or `base` where no round was accepted.
    """
    return "\n".join(_lines(settings, metrics, model)) + "\n"


def _lines(settings: Settings, metrics: Mapping[str, Any], model: str) -> Iterator[str]:
    task, scratch, undo = settings.task, settings.base.model == "scratch", settings.undo
    rounds = [one["round"] for one in metrics["rounds"] if one["accepted"] or model == "base"]
    shown, of = max(rounds), len(metrics["rounds"])
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [retract, undo-token]")
    if not scratch:
        yield f"base_model: {settings.base.model}"
    yield from ("---", "", f"# {settings.run.name}: a model that takes back its own mistakes", "")
    made = "trained from scratch on the task's own training problems" if scratch else f"`{settings.base.model}`"
    yield f"- Base: {made}, with the undo token `{undo.token}` added (initialised by `{undo.init}`)."
    yield f"- One undo token deletes: {undo.unit}."
    yield f"- Task: `{task.name}`; prompt: `{json.dumps(settings.base.prompt)}`."
    if model == "base":
        yield f"- None of {of} rounds was accepted: dev accuracy fell. These are the weights of the base model."
    else:
        sft = settings.sft
        yield (
            f"- Training: masked fine-tuning on traces of its own errors, form `{sft.form}`, mask `{sft.mask}`, "
            f"trainable `{sft.trainable}`, {sft.steps} steps of {sft.rows} x {sft.row_tokens} tokens; round {shown} of {of}, "
            f"seed {settings.run.seed}."
        )
    if settings.dpo.steps and model in ("dpo", "grpo"):
        dpo = settings.dpo
        how = f"loss `{dpo.loss}`, beta {dpo.beta:g}, form `{dpo.form}`"
        yield f"- Then preferences ({how}): {dpo.steps} steps of {dpo.batch} pairs."
    if model == "grpo":
        grpo = settings.grpo
        yield (
            f"- Then reinforcement learning (GRPO, loss `{grpo.loss}`, credit `{grpo.credit}`): {grpo.steps} steps of "
            f"{grpo.problems} problems x {grpo.group} rollouts."
        )
    for name, found in metrics["counts"]["training"].items():
        yield f"- Training run `{name}`: {found['step']} steps, {found['tokens']:,} tokens."
    yield from ("", "## How it was measured", "")
    yield f"Round {shown}, test split, one seed; 95 % intervals over problems. Tokens count what was deleted."
    yield from (
        "",
        "| model | mode | temperature | problems | n | accuracy | tokens a problem | undo rate | spurious |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for row in metrics["evaluations"]:
        if row["round"] == shown and row["split"] == "test" and row["group"] in GROUPS and row["n"]:
            low, high = row["ci95"]
            accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
            rest = (
                _shown(row.get("tokens_per_problem"), ".0f"),
                *(_shown(row.get(f"{key}_rate"), ".3f") for key in ("undo", "spurious_undo")),
            )
            place = f"{row['model']} | {row['mode']} | {row['temperature']:g} | {row['group']} | {row['n']}"
            yield f"| {place} | {accuracy} | {' | '.join(rest)} |"
    yield from ("", "## How to decode", "")
    yield (
        'Deleted tokens have to leave the context as they did in training: `python -m actors.generate --model FOLDER "question"`. '
        "`retract.json` holds the undo token, the unit, the prompt and the decoding settings. Plain generation writes the undo "
        "token and keeps what it should delete."
    )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
