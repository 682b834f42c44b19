"""Renders chat templates in a process of its own, within bounds of memory and processor time.

Templates come from tenants. jinja's immutable sandbox keeps one from reading or changing anything but its input; it
does not keep one from running forever or from filling the memory. So this file is run as a program: the process has no
credentials in its environment, cannot write files or start processes, and is killed by its parent when a job takes too
long, or by the kernel when it has used its time or memory. It imports jinja2 and nothing of Lorapool.

Jobs and answers are JSON, each after its length in 4 bytes. What a template is given is the same as in transformers'
`apply_chat_template`, and so is what it renders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import resource
import struct
import sys
from collections import OrderedDict
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 16 * 2**20
"""Longest rendered prompt: the longest body, and as much again for each of its characters that JSON escapes."""
MAX_MEMORY_BYTES = 512 * 2**20
CACHED = 64
"""Compiled templates that are kept."""
LENGTH = struct.Struct(">I")
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "

Job = dict[str, Any]


class Refusal(Exception):
    """The template refuses its input, or cannot be rendered; the message says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what an assistant says for training: its content."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore, by which Python's own objects could be reached."""

    def __init__(*args: Any, **values: Any) -> None:
        self, rest = args[0], args[1:]
        found = dict(*rest, **values)
        for name in found:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"A template cannot store {name!r} in a namespace.")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


class Renderer:
    def __init__(self) -> None:
        self._environment = environment()
        self._compiled: OrderedDict[str, jinja2.Template] = OrderedDict()

    def answer(self, job: Job) -> Any:
        """The answer to a job. Raises Refusal."""
        try:
            if job["do"] == "render":
                return self._render(job)
            if job["do"] == "literals":
                return self._literals(str(job["template"]))
            return tokenizer_facts(str(job["path"]))
        except RecursionError:
            raise Refusal("it is nested too deeply") from None
        except MemoryError:
            raise Refusal("it needs too much memory") from None
        except Exception as error:  # a template may raise anything
            raise Refusal(str(error) or type(error).__name__) from error

    def _template(self, text: str) -> jinja2.Template:
        if text not in self._compiled:
            self._compiled[text] = self._environment.from_string(text)
            if len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        return self._compiled[text]

    def _render(self, job: Job) -> str:
        messages = [_with_aliases(message) for message in job["messages"]]
        final = messages[-1]["content"] if job["continue_final"] else None
        if final is not None:
            messages[-1]["content"] = final + _CONTINUE
        parts: list[str] = []
        size = 0
        variables = {**job["variables"], "messages": messages, "tools": job["tools"], "documents": job.get("documents"),
                     "add_generation_prompt": job["add_generation_prompt"]}  # fmt: skip
        for part in self._template(job["template"]).generate(variables):
            size += len(part)
            if size > MAX_OUTPUT_CHARS:
                raise Refusal(f"it renders more than {MAX_OUTPUT_CHARS} characters")
            parts.append(part)
        rendered = "".join(parts)
        return rendered if final is None else _cut(rendered, final)

    def _literals(self, text: str) -> list[str]:
        """Every text that the template itself contains, of which control tokens are the ones that it writes."""
        tree = self._environment.parse(text)
        found = {node.data for node in tree.find_all(nodes.TemplateData)}
        found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self._template(text)  # so that one that does not compile is refused now
        return sorted(found)


def _with_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """The reasoning under the second name that templates know it by."""
    reasoning = message.get("reasoning_content")
    return {**message} if reasoning is None else {"thinking": reasoning, **message}


def _cut(rendered: str, final: str) -> str:
    """The prompt up to the end of the last message, as transformers cuts it."""
    tag = _CONTINUE.strip()
    at = rendered.rfind(tag)
    if at < 0 or final.strip() not in rendered:
        raise Refusal("it does not write the last message as it is, so that message cannot be continued")
    kept = rendered[:at]
    return kept if rendered[at : at + len(_CONTINUE)] == _CONTINUE else kept.rstrip()


def tokenizer_facts(path: str) -> dict[str, Any]:
    """A hash of a tokenizer.json's vocabulary, and the tokens that were added to it."""
    with open(path, encoding="utf-8") as file:
        tokenizer = json.load(file)
    found = tokenizer["model"]["vocab"]
    pieces = sorted(found, key=found.__getitem__) if isinstance(found, dict) else [piece for piece, _ in found]
    ids = sorted(found.values()) if isinstance(found, dict) else []
    vocabulary = json.dumps([pieces, ids], ensure_ascii=False)
    added = [
        {name: token.get(name) for name in ("id", "content", "special", "lstrip", "rstrip")}
        for token in tokenizer.get("added_tokens") or ()
    ]
    return {"vocabulary": hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest(), "added": added}


# --- the process --------------------------------------------------------------------------


def _bound_process() -> None:
    for what, most in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))


def _bound_time(seconds: float) -> None:
    """Lets the kernel end this process if it computes for longer, also when its parent is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Answers jobs until the parent closes the pipe."""
    renderer = Renderer()
    while len(head := jobs.read(LENGTH.size)) == LENGTH.size:
        raw = jobs.read(LENGTH.unpack(head)[0])
        try:
            job = json.loads(raw)
            _bound_time(job["seconds"])
            answer = {"value": renderer.answer(job)}
        except Refusal as refusal:
            answer = {"refusal": str(refusal)[:600]}
        data = json.dumps(answer).encode()
        answers.write(LENGTH.pack(len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    _bound_process()
    serve(sys.stdin.buffer, sys.stdout.buffer)
