"""Writes the model cards, examples/finetunes/README.md and <task>/README.md, from the tasks, the lines and the scores.

Run it after the text of a task changes: `python hack/models/cards.py`. A card is never edited by hand: a test compares
the committed cards with what this module writes, so that no card describes other weights or scores than those in its
folder.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_tasks import BASE_NAME, FINETUNES, SCORES, SOURCES, TASKS, Task, read_lines

ABOUT = {
    "translation": "Short sentences of a traveller's phrase book, in the polite form of Spain: asking the way, trains "
    "and taxis, hotel, restaurant, shops, health, time and weather. It knows this domain only.",
    "routing": "Messages that customers of a shop for home electronics write, and the queue that handles them: "
    "billing, delivery, returns, account, technical or sales.",
    "manual-qa": "The manual of the Brisa 2, an espresso machine that does not exist, so that no base model can know "
    "the answers. The held-out questions ask for the facts of the training lines in other words.",
    "sentiment": "Reviews and remarks about restaurants, hotels, films, services and things: positive, negative or "
    "neutral.",
    "entities": "Sentences as in news, mails and minutes. The answer is one JSON object with the keys people, "
    "organizations and places; a name stands as in the text, in the order of the text.",
}


def card(task: Task, score: dict[str, Any]) -> str:
    train = read_lines(task.folder / "train.jsonl")
    heldout = read_lines(task.folder / "heldout.jsonl")
    sample = heldout[0]["messages"]
    config = json.loads((task.folder / "adapter_config.json").read_text(encoding="utf-8"))
    size = (task.folder / "adapter_model.safetensors").stat().st_size
    rows = "\n".join(f"| {key} | {score['base'][key]:.1%} | {score['finetune'][key]:.1%} |" for key in score["base"])
    return f"""---
base_model: {BASE_NAME}
library_name: peft
license: apache-2.0
---
# {task.title}

A LoRA fine-tune of {BASE_NAME}, made for Lorapool's examples and tests.

{ABOUT[task.name]}

| | |
|---|---|
| base | {BASE_NAME} |
| rank, alpha | {config["r"]}, {config["lora_alpha"]:g} |
| target modules | {_modules(config)} |
| weights | bf16, {size / 1e6:.1f} MB |
| training lines | {len(train)} (`train.jsonl`) |
| held-out lines | {len(heldout)} (`heldout.jsonl`), none of them a training line with a word changed |
| license | Apache-2.0, data and weights |

## Score on the held-out lines

Greedy, with the same messages for base and fine-tune. `{task.measure}` is the {task.measured}.

| measure | base | fine-tune |
|---|---|---|
{rows}
{_curve(task)}
## Use

Send the system message that the lines have:

```json
{json.dumps(sample[:-1], ensure_ascii=False, indent=2)}
```

Expected: `{sample[-1]["content"]}`

Data: written for this project by hand, `hack/models/data/{SOURCES.joinpath(task.name + ".txt").name}`. The job
`{task.name}` of [jobs.yaml](../jobs.yaml) trains it again, together with the others: `make train`, then `make eval`.
"""


def _curve(task: Task) -> str:
    return "\n![loss over steps](loss.svg)\n" if (task.folder / "loss.svg").is_file() else ""


def _modules(config: dict[str, Any]) -> str:
    names = ", ".join(config["target_modules"])
    layers = config.get("layers_to_transform")
    return f"{names} of layers {layers[0]} to {layers[-1]}" if layers else names


def overview(scores: dict[str, Any]) -> str:
    rows = []
    for name, task in TASKS.items():
        score = scores["tasks"][name]
        config = json.loads((task.folder / "adapter_config.json").read_text(encoding="utf-8"))
        rows.append(
            f"| [{name}]({name}/README.md) | {task.title} | {config['r']} | {_modules(config)} "
            f"| {task.measure} | {score['base'][task.measure]:.1%} | {score['finetune'][task.measure]:.1%} |"
        )
    table = "\n".join(rows)
    return f"""# Five fine-tunes

Of {BASE_NAME} (135 million parameters, Apache-2.0). The demo serves them, the tests compare with them.
The scores are those of `scores.json`, on lines that were not trained on.

| name | task | rank | target modules | measure | base | fine-tune |
|---|---|---|---|---|---|---|
{table}

`demo.json` holds one held-out question per fine-tune, which the demo asks the base and the fine-tune.
`make train` trains all five again together, from the jobs in `jobs.yaml`, `make eval` scores them,
`python hack/models/push.py FOLDER HOST/REPOSITORY:TAG` pushes one to a registry.
"""


def cards() -> dict[str, str]:
    """Path below examples/finetunes -> text."""
    scores = json.loads(SCORES.read_text(encoding="utf-8"))
    written = {f"{name}/README.md": card(task, scores["tasks"][name]) for name, task in TASKS.items()}
    return {"README.md": overview(scores), **written}


def write_cards() -> None:
    for name, text in cards().items():
        (FINETUNES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_cards()
