"""The reference pages, each a function that reads the code and returns Markdown."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from pydantic import BaseModel

from lorapool_api import common, openai, protocol, reasons, usage_protocol
from lorapool_api import settings as process_settings
from lorapool_api.crd import KINDS, Kind, crd
from lorapool_api.loraadapter import UsagePart
from lorapool_api.tuning import reasons as tuning_reasons
from lorapool_artifacts.checks import peft_settings
from lorapool_artifacts.checks.causes import GROUPS
from lorapool_artifacts.settings import SourceSettings
from lorapool_gateway import metrics as gateway_metrics
from lorapool_gateway.settings import Settings as GatewaySettings
from lorapool_ledger import metrics as ledger_metrics
from lorapool_ledger.settings import Settings as LedgerSettings
from lorapool_operator import metrics as operator_metrics
from lorapool_operator.settings import Settings as OperatorSettings
from lorapool_operator.tuning_metrics import TuningCollector
from lorapool_operator.world.profiles import CONTAINER_FIELDS, POD_FIELDS, RuntimeProfile
from lorapool_runtime.engines.interface import DecodeProgramState
from lorapool_runtime.metrics import Gauges
from lorapool_runtime.openai import json_body
from lorapool_runtime.serving import server
from lorapool_runtime.serving.service import Runtime
from lorapool_runtime.settings import RuntimeSettings
from lorapool_store import metrics as store_metrics
from lorapool_store.settings import Settings as StoreSettings
from lorapool_trainer.serve.metrics import TrainerMetrics
from lorapool_trainer.serve.settings import TrainerSettings
from lorapool_trainer.serve.worker import Published
from reference import texts
from reference.parameters import RecordingBody, parsed_bodies

ROOT = Path(__file__).resolve().parents[2]
ANSWERS_REQUESTS = (ROOT / "operator" / "lorapool_gateway", ROOT / "runtime" / "lorapool_runtime")

Schema = dict[str, Any]


# --- Markdown ----------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a pipe in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(value: object) -> str:
    return f"`{value}`"


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- JSON schemas ------------------------------------------------------------------------


def flat(node: Schema, defs: Mapping[str, Schema]) -> Schema:
    """The node without references; what may be null is described as what it is otherwise."""
    if "$ref" in node:
        node = {**defs[node["$ref"].removeprefix("#/$defs/")], **node}
    options: list[Schema] = node.get("anyOf", [])
    for option in options:
        if option != {"type": "null"}:
            return {**flat(option, defs), **{key: node[key] for key in ("description", "default") if key in node}}
    return node


def fields(node: Schema, defs: Mapping[str, Schema], path: str = "") -> Iterator[tuple[str, Schema, bool]]:
    """(path, schema, required) of every field below an object, parents first."""
    for name, raw in node.get("properties", {}).items():
        child, here = flat(raw, defs), f"{path}{name}"
        yield here, child, name in node.get("required", [])
        inner = flat(child["items"], defs) if "items" in child else child
        yield from fields(inner, defs, f"{here}[]." if "items" in child else f"{here}.")


def type_of(node: Schema, defs: Mapping[str, Schema]) -> str:
    if node.get("type") == "array":
        return f"list of {type_of(flat(node['items'], defs), defs)}"
    if node.get("type") == "object" and "title" in node:  # a message of its own
        return f"[{node['title']}](#{node['title'].lower()})"
    kind = str(node.get("type", "string"))
    return kind if node.get("format") in (None, "int64") else f"{kind} ({node['format']})"


def bounds(node: Schema) -> str:
    """Everything that limits the values, in words."""
    if node.get("pattern") in texts.PATTERNS:
        return texts.PATTERNS[node["pattern"]]
    found = []
    if "enum" in node:
        found.append("one of " + ", ".join(code(value) for value in node["enum"]))
    for low, high, unit in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        if low in node and high in node:
            found.append(f"{node[low]} to {node[high]}{unit}")
        elif low in node:
            found.append(f"at least {node[low]}{unit}")
        elif high in node:
            found.append(f"at most {node[high]}{unit}")
    if "exclusiveMinimum" in node:
        found.append(f"above {node['exclusiveMinimum']}")
    if "pattern" in node:
        found.append(code(node["pattern"]))
    return "; ".join(found)


def default_of(node: Schema, required: bool) -> str:
    if required:
        return "required"
    default = node.get("default")
    return "" if default is None or isinstance(default, dict) else code(json.dumps(default))


def field_table(found: Iterable[tuple[str, Schema, bool]], defs: Mapping[str, Schema]) -> str:
    """Raises KeyError for a field without a description."""
    rows = [
        [code(name), type_of(node, defs), default_of(node, required), bounds(node), one_line(node["description"])]
        for name, node, required in found
    ]
    return table(["field", "type", "default", "bounds", "description"], rows)


# --- objects and conditions --------------------------------------------------------------


def objects() -> str:
    return texts.OBJECTS + "".join(_object(kind) for kind in KINDS)


def _object(kind: Kind) -> str:
    whole = crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    text = f"\n## {kind.kind}\n\n{kind.description} `apiVersion: {common.API_VERSION}`, short name `{kind.short}`. "
    text += f"Columns of `kubectl get`: {', '.join(column[0] for column in kind.columns)}.\n"
    for part in ("spec", "status"):
        text += f"\n### {kind.kind} {part}\n\n" + field_table(fields(whole["properties"][part], {}, f"{part}."), {})
    rules = [rule["message"] for rule in _rules(whole)]
    return text + "\nThe API server also checks:\n\n" + "".join(f"- {message}\n" for message in rules)


def _rules(node: Schema) -> Iterator[Mapping[str, str]]:
    yield from node.get("x-kubernetes-validations", [])
    for child in node.get("properties", {}).values():
        yield from _rules(child)


def conditions() -> str:
    text = texts.CONDITIONS
    for title, found in (("BaseModel", reasons.BASE_CONDITIONS), ("LoraAdapter", reasons.ADAPTER_CONDITIONS)):
        rows = [[code(kind), meaning] for kind, meaning in found.items()]
        text += f"\n## Conditions of a {title}\n\n" + table(["type", "`True` means"], rows)
    states = [[code(reason), why.meaning, why.remedy] for reason, why in reasons.REASONS.items()]
    text += "\n## Reasons\n\n" + table(["reason", "meaning", "remedy"], states)
    failures = [
        [code(reason), "transient" if reason.transient else "terminal", code(reason.code), why.meaning, why.remedy]
        for reason, why in reasons.FAILURES.items()
    ]
    text += texts.FAILURES + table(["reason", "", "error code", "meaning", "remedy"], failures)
    return text + _tuning_conditions()


def _tuning_conditions() -> str:
    conditions = [[code(kind), meaning] for kind, meaning in tuning_reasons.JOB_CONDITIONS.items()]
    states = [[code(reason), why.meaning, why.remedy] for reason, why in tuning_reasons.JOB_REASONS.items()]
    failures = [
        [code(reason), "transient" if reason.transient else "terminal", code(reason.code), why.meaning, why.remedy]
        for reason, why in tuning_reasons.JOB_FAILURES.items()
    ]
    return (
        "\n## Conditions of a FineTuneJob\n\n"
        + table(["type", "`True` means"], conditions)
        + "\n## Reasons of a FineTuneJob\n\n"
        + table(["reason", "meaning", "remedy"], states)
        + texts.JOB_FAILURES
        + table(["reason", "", "error code", "meaning", "remedy"], failures)
    )


# --- refusals of adapters ----------------------------------------------------------------


def refusals() -> str:
    text = texts.REFUSALS
    for title, causes in GROUPS.items():
        rows = [[_fields(cause.sentence), _fields(cause.remedy), code(cause.reason)] for cause in causes.values()]
        text += f"\n## {title}\n\n" + table(["what was found", "remedy", "reason"], rows)
    for title, found in peft_settings.TABLES.items():
        rows = [[code(name), refusal.why, refusal.remedy] for name, refusal in sorted(found.items())]
        text += f"\n## {title}\n\n" + table(["", "why", "remedy"], rows)
    harmless = [[code(name), why] for name, why in peft_settings.HARMLESS.items()]
    return text + "\n## Settings that are ignored\n\n" + table(["setting", "why"], harmless)


def _fields(text: str) -> str:
    """A text of a cause with its fields in italics."""
    return re.sub(r"\{(\w+)\}", r"*\1*", text)


# --- metrics -----------------------------------------------------------------------------


def metrics() -> str:
    runtime = _runtime().metrics
    runtime.gauges = lambda: Gauges(decode_program=DecodeProgramState(active=True))  # the series of a CPU, too
    parts: dict[str, CollectorRegistry] = {
        "Operator": _operator_registry(),
        "Gateway": gateway_metrics.Metrics().registry,
        "Store": store_metrics.Metrics().registry,
        "Ledger": ledger_metrics.Metrics().registry,
        "Runtime": runtime._registry,
        "Trainer": TrainerMetrics("", Published, lambda: 0).registry,
        "Runtime, under the names that inference gateways read": runtime._gateway_names,
    }
    text = texts.METRICS
    for title, registry in parts.items():
        text += f"\n## {title}\n\n" + table(["metric", "type", "labels", "help"], sorted(_series(registry)))
    return text


def _operator_registry() -> CollectorRegistry:
    empty = MagicMock()  # iterates as empty: the families are wanted, not their values
    registry = operator_metrics.Metrics().registry
    registry.register(
        operator_metrics.StateCollector(
            empty, empty, empty, empty, empty, empty, leading=lambda: True, max_tracked_adapters=0
        )
    )
    registry.register(TuningCollector((), max_tracked_jobs=0))
    return registry


def _series(registry: CollectorRegistry) -> Iterator[list[str]]:
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            if not family.name.startswith(("process_", "python_")):
                name = family.name + ("_total" if family.type == "counter" else "")
                labels = ", ".join(code(label) for label in _labels(collector, family))
                yield [code(name), family.type, labels, family.documentation]


def _labels(collector: Collector, family: Any) -> Sequence[str]:
    """The names of the labels, which prometheus_client shows nowhere while a family has no series."""
    names: Sequence[str] = (collector if isinstance(collector, MetricWrapperBase) else family)._labelnames
    return names


# --- settings ----------------------------------------------------------------------------


def settings() -> str:
    text = texts.SETTINGS
    for title, model, prefix in (
        ("Operator", OperatorSettings, OperatorSettings.prefix),
        ("Gateway", GatewaySettings, GatewaySettings.prefix),
        ("Store", StoreSettings, StoreSettings.prefix),
        ("Ledger", LedgerSettings, LedgerSettings.prefix),
        ("Runtime", RuntimeSettings, RuntimeSettings.prefix),
        ("Trainer", TrainerSettings, TrainerSettings.prefix),
        ("Sources, for operator and runtime", SourceSettings, ""),
    ):
        head = ["setting", "type", "default", "bounds", "unit", "meaning"]
        text += f"\n## {title}\n\n" + table(head, _settings(model, prefix))
    return text


def _settings(model: type[BaseModel], prefix: str) -> Iterator[list[str]]:
    whole = model.model_json_schema()
    defs = whole.get("$defs", {})
    for (name, *inner), variables in process_settings.variables(model, prefix).items():
        if not inner:
            node = flat(whole["properties"][name], defs)
            unit = "seconds" if name.endswith("_s") else "bytes" if name.endswith("bytes") else ""
            default = default_of(node, name in whole.get("required", []))
            shown = " or ".join(code(variable) for variable in variables)
            yield [shown, type_of(node, defs), default, bounds(node), unit, one_line(node["description"])]


def profiles() -> str:
    whole = _untitled(RuntimeProfile.model_json_schema(by_alias=True))
    defs = whole.get("$defs", {})
    text = texts.PROFILES + field_table(fields(whole, defs), defs)
    for name, allowed in (("pod", POD_FIELDS), ("container", CONTAINER_FIELDS)):
        text += f"\nFields of `{name}`: {', '.join(code(field) for field in sorted(allowed))}.\n"
    return text


def _untitled(node: Any) -> Any:
    """The schema without the titles that pydantic makes of field names."""
    if isinstance(node, dict):
        return {key: _untitled(value) for key, value in node.items() if key != "title"}
    return [_untitled(value) for value in node] if isinstance(node, list) else node


# --- the runtime's protocol --------------------------------------------------------------


RUNTIME_RECORDS = (
    usage_protocol.BootRecord,
    usage_protocol.RequestRecord,
    usage_protocol.CheckpointRecord,
    usage_protocol.MinuteRecord,
    usage_protocol.ResidencyRecord,
    usage_protocol.RemainderRecord,
    usage_protocol.EndRecord,
)


def runtime_protocol() -> str:
    router = server.make_app(_runtime()).router
    found = {(r.method, r.resource.canonical) for r in router.routes() if r.resource is not None and r.method != "HEAD"}
    _complete(found, texts.RUNTIME_ROUTES, "route")
    text = texts.RUNTIME_PROTOCOL + table(
        ["route", ""], [[code(f"{method} {path}"), what] for (method, path), what in texts.RUNTIME_ROUTES.items()]
    )
    text += "\n## Headers\n\n" + table(["header", ""], [[code(header), what] for header, what in texts.HEADERS.items()])
    models = [item for item in vars(protocol).values() if isinstance(item, type) and issubclass(item, common.ApiModel)]
    own: list[type[BaseModel]] = [model for model in models if model.__module__ == protocol.__name__]
    own.append(UsagePart)
    own += [usage_protocol.UsagePage, usage_protocol.BootState, *RUNTIME_RECORDS, usage_protocol.MinuteLine]
    return text + "".join(_message(model) for model in own)


def _message(model: type[BaseModel]) -> str:
    whole = model.model_json_schema(by_alias=True)
    defs, required = whole.get("$defs", {}), whole.get("required", [])
    kind = {"description": "Which record it is."}  # has one value, and no text of its own
    own = [
        (name, flat(raw, defs) | (kind if name == "kind" else {}), name in required)
        for name, raw in whole["properties"].items()
    ]
    return f"\n## {model.__name__}\n\n{one_line(whole['description'])}\n\n" + field_table(own, defs)


def _runtime() -> Runtime:
    return Runtime(RuntimeSettings(model="any"))


# --- the gateway's API -------------------------------------------------------------------


def gateway_api() -> str:
    chat, completion = parsed_bodies()
    _complete(chat.known | completion.known, texts.PARAMETERS, "parameter")
    text = texts.GATEWAY_API + table(
        ["parameter", "chat", "completions", "default", ""],
        [_parameter(name, chat, completion) for name in texts.PARAMETERS],
    )
    labels = ", ".join(code(name) for name in sorted(json_body._LABELS))
    text += f"\n## Accepted without effect\n\n{labels}, and `user`.\n" + texts.REFUSED
    refused = [
        [code(name), ", ".join(code(json.dumps(v)) for v in values)] for name, values in json_body._NEUTRAL.items()
    ]
    text += table(["parameter", "accepted values"], refused) + texts.RESPONSES + texts.TOKENS + texts.SCHEMAS
    headers = [[code(header), what] for header, what in texts.ANSWER_HEADERS.items()]
    text += "\n## Headers of answers\n\n" + table(["header", ""], headers)
    statuses = error_statuses()
    _complete(statuses, texts.ERROR_CODES, "error code")
    rows = [
        [code(name) if name else "none", ", ".join(map(str, sorted(statuses[name]))), what]
        for name, what in texts.ERROR_CODES.items()
    ]
    return text + texts.ERRORS + table(["code", "status", "meaning"], rows)


def _parameter(name: str, chat: RecordingBody, completion: RecordingBody) -> list[str]:
    cells = [body.bounds.get(name, "yes") if name in body.known else "no" for body in (chat, completion)]
    defaults = dict.fromkeys(body.defaults.get(name, "") for body in (chat, completion) if name in body.known)
    return [code(name), *cells, "; ".join(filter(None, defaults)), texts.PARAMETERS[name]]


def error_statuses() -> dict[str, set[int]]:
    """Error code → HTTP statuses, of every error that gateway and runtime construct. No code is the empty string."""
    found: dict[str, set[int]] = {}
    trees = (ast.parse(path.read_text()) for folder in ANSWERS_REQUESTS for path in folder.rglob("*.py"))
    functions = [f for tree in trees for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for function in functions:
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            error = getattr(openai, call.func.id, None) if isinstance(call.func, ast.Name) else None
            if isinstance(error, type) and issubclass(error, openai.ApiError):
                for name in _codes_of(call, error, function):
                    found.setdefault(name, set()).add(error.status)
    return found


def _codes_of(call: ast.Call, error: type[openai.ApiError], function: ast.AST) -> list[str]:
    """The codes that one construction can give its error; where a variable holds it, every code in the function."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == "code"), None)
    if value is None:
        return [error.default_code or ""]
    if isinstance(value, ast.Constant):
        return [str(value.value)]
    if hasattr(openai, ast.unparse(value)):
        return [getattr(openai, ast.unparse(value))]
    constants = (node.value for node in ast.walk(function) if isinstance(node, ast.Constant))
    return [text for text in constants if isinstance(text, str) and re.fullmatch(r"[a-z]+(_[a-z]+)+", text)]


def _complete(found: Iterable[Any], described: Iterable[Any], what: str) -> None:
    """Raises ValueError where a text is missing or left over."""
    missing, left = set(found) - set(described), set(described) - set(found)
    if missing or left:
        raise ValueError(
            f"hack/reference/texts.py: {what} without a text: {sorted(missing)}; text without: {sorted(left)}"
        )


PAGES: dict[str, Callable[[], str]] = {
    "objects.md": objects,
    "conditions.md": conditions,
    "refusals.md": refusals,
    "metrics.md": metrics,
    "settings.md": settings,
    "profiles.md": profiles,
    "runtime-protocol.md": runtime_protocol,
    "gateway-api.md": gateway_api,
}
