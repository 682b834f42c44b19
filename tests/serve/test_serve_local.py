"""`make serve` with a fake runtime: the YAML of a folder becomes models, and stays what the folder says."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fakes import digest_of
from serve_kit import FAKE_RUNTIME, TIMEOUT_S, Served, adapter, base, serving

from lorapool_serve.__main__ import main

COMMAND = (sys.executable, str(FAKE_RUNTIME))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("objects")
    with serving(folder, tmp_path_factory.mktemp("state") / "serve", COMMAND) as made:
        made.write("base.yaml", base())
        made.write("route.yaml", adapter("route"))
        made.until((made.state / "summary.json").exists)
        yield made


def answers_with(served: Served, model: str, uri: str) -> bool:
    """Whether the model answers with the weights of this source."""
    try:
        return served.ask(model).startswith(f"default/{model}@{digest_of(uri)}")
    except openai.NotFoundError:
        return False


def is_gone(served: Served, model: str) -> bool:
    try:
        served.ask(model)
    except openai.NotFoundError:
        return True
    return False


def test_the_models_of_a_folder_answer_and_the_summary_names_them(served: Served) -> None:
    assert answers_with(served, "route", "pvc://adapters/route")
    summary = served.summary()
    assert set(summary) == {"gateway_url", "api_key", "models"}
    assert {"default/tiny", "default/route"} <= set(summary["models"])
    assert (served.state / "summary.json").stat().st_mode & 0o777 == 0o600


def test_the_state_is_printed_in_the_columns_of_the_crd(served: Served) -> None:
    served.ask("route")
    served.until(lambda: "route   tiny   True    Loaded   1/1" in served.output)
    assert "NAMESPACE   NAME    BASE   READY   STATE" in served.output


def test_an_edited_file_changes_its_models_and_a_deleted_one_removes_them(served: Served) -> None:
    served.write("edited.yaml", adapter("edited", uri="pvc://adapters/before"), adapter("second"))
    served.until(lambda: answers_with(served, "edited", "pvc://adapters/before"))
    served.write("edited.yaml", adapter("edited", uri="pvc://adapters/after"))
    served.until(lambda: answers_with(served, "edited", "pvc://adapters/after"))
    served.until(lambda: is_gone(served, "second"))
    (served.folder / "edited.yaml").unlink()
    served.until(lambda: is_gone(served, "edited"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kind: [", "bad.yaml: not YAML: while parsing"),
        ("hello", "bad.yaml: not a Kubernetes object: it needs kind and metadata.name."),
        ("{kind: Pod, metadata: {name: a}}", "bad.yaml: Pod a: only BaseModel, LoraAdapter and Secret can be served"),
        ("{kind: FineTuneJob, metadata: {name: a}}", "bad.yaml: FineTuneJob a: jobs are not served; train it with"),
        (
            "{kind: LoraAdapter, metadata: {name: a}, spec: {source: {uri: 'pvc://a/b'}}}",
            "bad.yaml: LoraAdapter a: spec.baseModelRef: Field required.",
        ),
        (
            "{kind: LoraAdapter, metadata: {name: a}, spec: {idelAfter: 1s, baseModelRef: {name: tiny},"
            " source: {uri: 'pvc://a/b'}}}",
            "bad.yaml: LoraAdapter a: spec.idelAfter: unknown field.",
        ),
    ],
)
def test_a_file_with_a_mistake_is_one_line_and_harms_no_other(served: Served, text: str, line: str) -> None:
    (served.folder / "bad.yaml").write_text(text)
    served.until(lambda: line in served.output)
    assert served.output.count(line) == 1
    assert answers_with(served, "route", "pvc://adapters/route")


def test_a_file_that_is_broken_by_an_edit_keeps_its_models(served: Served) -> None:
    served.write("kept.yaml", adapter("kept"))
    served.until(lambda: answers_with(served, "kept", "pvc://adapters/kept"))
    (served.folder / "kept.yaml").write_text("kind: {")
    served.until(lambda: "kept.yaml: not YAML" in served.output)
    assert answers_with(served, "kept", "pvc://adapters/kept")


def test_an_adapter_of_an_unknown_base_is_one_line_with_its_name(served: Served) -> None:
    served.write("orphan.yaml", adapter("orphan", base="nowhere"))
    served.until(lambda: "BaseNotFound   LoraAdapter default/orphan:" in served.output)
    assert answers_with(served, "route", "pvc://adapters/route")


def test_an_idle_base_stops_its_process_until_the_next_request_and_a_deleted_one_for_good(served: Served) -> None:
    served.write("nap.yaml", base("nap", scaling={"idleAfter": "5s"}), adapter("dreamer", base="nap"))
    served.until(lambda: answers_with(served, "dreamer", "pvc://adapters/dreamer"))
    served.until(lambda: len(served.children()) == 1)
    assert answers_with(served, "dreamer", "pvc://adapters/dreamer")
    assert len(served.children()) == 2
    (served.folder / "nap.yaml").unlink()
    served.until(lambda: len(served.children()) == 1)


def test_a_runtime_that_dies_is_started_again(served: Served) -> None:
    [child] = served.children()
    os.kill(child, signal.SIGKILL)
    served.until(lambda: served.children() not in ([], [child]))
    served.until(lambda: answers_with(served, "route", "pvc://adapters/route"))


def test_a_second_start_names_the_url_of_the_first_and_ctrl_c_leaves_no_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = tmp_path / "objects", tmp_path / "serve"
    folder.mkdir()
    with serving(folder, state, COMMAND) as first:
        first.write("base.yaml", base())
        first.until((state / "summary.json").exists)
        assert main([str(folder), "--state", str(state), "--port", "0"]) == 0
        assert first.summary()["gateway_url"] in capsys.readouterr().out
        children = first.children()
        assert first.interrupt() == 0
    assert len(children) == 1
    assert not Path(f"/proc/{children[0]}").exists()
    assert "Traceback" not in first.output
    assert "ERROR" not in (state / "serve.log").read_text()


def test_a_runtime_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    with serving(folder, tmp_path / "serve", COMMAND) as served:
        served.write("base.yaml", base())
        served.until(served.children)
        [child] = served.children()
        ended = os.pidfd_open(child)
        served.popen.kill()
        served.popen.wait()
    assert select.select([ended], [], [], TIMEOUT_S)[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [(("nowhere",), "nowhere is no folder"), ((".", "--local-base", "hf://a/b=nowhere"), "contains no config.json")],
)
def test_a_command_line_that_cannot_work_says_why(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
