"""One log format for all processes."""

import ast
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorapool_api.logs import FIELDS, JsonFormatter, TextFormatter, set_up_logs

ROOT = Path(__file__).resolve().parents[2]


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("lorapool_x.part", logging.INFO, __file__, 1, message, args, None)
    made.created = 1769860800.25
    made.__dict__.update(extra)
    return made


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_json_line_has_the_common_keys_then_its_own() -> None:
    line = JsonFormatter("gateway").format(record("woke %s", "it", base="team/llama", settings="of kopf"))
    assert json.loads(line) == {
        "time": "2026-01-31T12:00:00.250Z",
        "level": "INFO",
        "logger": "lorapool_x.part",
        "message": "woke it",
        "process": "gateway",
        "base": "team/llama",
    }


def test_a_json_line_stays_one_line_whatever_it_holds() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        failed = record("a\nb", where=Path("/x"))
        failed.exc_info = sys.exc_info()
    line = JsonFormatter("runtime").format(failed)
    assert "\n" not in line
    assert json.loads(line)["where"] == "/x"
    assert "ValueError: first" in json.loads(line)["exception"]


def test_a_text_line_quotes_values_with_spaces() -> None:
    line = TextFormatter().format(record("not applied", adapter="a/b", error="two words"))
    assert line == '2026-01-31T12:00:00.250Z INFO    lorapool_x.part: not applied adapter=a/b error="two words"'


@pytest.mark.parametrize(
    ("log_format", "terminal", "text"),
    [("auto", True, True), ("auto", False, False), ("json", True, False), ("text", False, True)],
)
def test_lines_are_text_on_a_terminal_and_json_elsewhere_unless_one_is_chosen(
    log_format: str, terminal: bool, text: bool, root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    set_up_logs("runtime", "INFO", log_format, quiet=["chatty"])  # type: ignore[arg-type]
    (handler,) = root_logger.handlers
    assert isinstance(handler.formatter, TextFormatter if text else JsonFormatter)
    assert not logging.getLogger("chatty").isEnabledFor(logging.INFO)
    assert logging.getLogger("ours").isEnabledFor(logging.INFO)


def extra_keys(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extra" and isinstance(node.value, ast.Dict):
            yield from (key.value for key in node.value.keys if isinstance(key, ast.Constant))


def test_every_field_of_a_log_line_has_its_one_documented_name() -> None:
    used = {key: path for folder in ("operator", "runtime") for path in (ROOT / folder).rglob("*.py")
            for key in extra_keys(path)}  # fmt: skip
    assert {key: str(path.relative_to(ROOT)) for key, path in used.items() if key not in FIELDS} == {}
