"""Makes chat formats: of the base, and of adapters whose files or objects say something else.

An adapter's tokenizer is used if it is the base's with additions in rows that the base has: added tokens are matched in
prompts, and no weight is needed for them. One with another vocabulary, or with a token in use that has no row, is
refused with the reason.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorapool_api.chat import ChatTemplate, Generation, TemplateOrigin, TemplateUse
from lorapool_api.common import FailureReason
from lorapool_api.protocol import BaseChat
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import TOKENIZER
from lorapool_runtime.openai.chats.chat_files import (
    NO_FILES,
    ChatFiles,
    added_tokens,
    read_chat_files,
    template_of_several,
)
from lorapool_runtime.openai.chats.chat_format import AddedToken, ChatFormat, ExtraTokens
from lorapool_runtime.openai.chats.template_process import TemplateRefusedError, TemplateTimeoutError
from lorapool_runtime.openai.chats.template_shape import TemplateShape, infer_shape
from lorapool_runtime.openai.chats.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CACHED = 128
"""Shapes of templates that are kept, and facts of tokenizers."""
MAX_EXTRA = 4096
"""Tokens that one adapter may add."""
NO_BASE_CHAT = BaseChat()


class ChatFormats:
    """Thread-safe. Methods block: they read files and render templates."""

    def __init__(self, tokenizer: Tokenizer, *, rows: int, eos_ids: Collection[int]) -> None:
        """`rows`: rows of the base's embedding. `eos_ids`: the tokens that end an answer in the engine."""
        self._tokenizer = tokenizer
        self._rows = rows
        self._eos_ids = frozenset(eos_ids) | tokenizer.eos_token_ids
        self._base_added = {token.text: token for token in tokenizer.added_tokens}
        self._shape_of = functools.lru_cache(CACHED)(self._infer)
        self._facts: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self.said = NO_BASE_CHAT
        self.base = self._of_base_files()

    def use_base(self, said: BaseChat) -> None:
        """Makes the base's format of what its object says from now on.

        What cannot be used is logged and reported, and the base's files decide instead.
        """
        try:
            self.base = self._of_base(said)
        except ArtifactError as error:
            log.error("the BaseModel's chat settings are not used: %s", error.message)
            self.base = replace(self._of_base_files(), problem=error.message[:1024])
        self.said = said

    def _of_base_files(self) -> ChatFormat:
        """What the base's files say; no template if theirs cannot be used."""
        try:
            return self._of_base(NO_BASE_CHAT)
        except ArtifactError as error:
            log.error("the base's chat template is not used: %s", error.message)
            special = self._tokenizer.special_tokens
            plain = self._made(None, None, special, frozenset(), ExtraTokens(), TemplateOrigin.NONE)
            return replace(plain, problem=error.message[:1024])

    def _of_base(self, said: BaseChat) -> ChatFormat:
        """Raises ArtifactError for a template or a token that cannot be used."""
        template, tool_template = self._base_templates()
        origin = TemplateOrigin.SOURCE if template is not None else TemplateOrigin.NONE
        if said.chat_template is not None:
            template, tool_template, origin = said.chat_template.inline, None, TemplateOrigin.SPEC
        stops = self._ids_of_texts(said.generation, ExtraTokens())
        return self._made(template, tool_template, self._tokenizer.special_tokens, stops, ExtraTokens(), origin)

    def read(self, folder: Path) -> ChatFiles:
        """What an adapter's files say, with all tokens that its tokenizer adds. Raises ArtifactError."""
        files = read_chat_files(folder)
        return replace(files, added=self._added_of(files), tokenizer=None)

    def of_adapter(self, files: ChatFiles, template: ChatTemplate | None, generation: Generation | None) -> ChatFormat:
        """An adapter's format. Raises ArtifactError for what cannot be used, with the remedy."""
        base = self.base
        if files == NO_FILES and template is None and generation is None:
            return self._of_base_for_adapter(base)
        wanted, tools, origin = self._adapter_templates(files, template, base)
        extra = self._extra(files, generation, wanted)
        variables = {**base.variables, **files.special_tokens}
        stops = self._ids_of_texts(generation, extra) if generation is not None else self._ids_of_files(files, extra)
        made = self._made(wanted, tools, variables, base.stop_ids | stops, extra, origin)
        return self._of_base_for_adapter(made) if origin is TemplateOrigin.BASE else made

    @staticmethod
    def _of_base_for_adapter(made: ChatFormat) -> ChatFormat:
        origin = TemplateOrigin.NONE if made.template is None else TemplateOrigin.BASE
        return replace(made, origin=origin, problem="")

    # --- templates ------------------------------------------------------------------------

    def _base_templates(self) -> tuple[str | None, str | None]:
        found = self._tokenizer.chat_template
        return template_of_several(found) if isinstance(found, Mapping) else (found or None, None)

    @staticmethod
    def _adapter_templates(
        files: ChatFiles, said: ChatTemplate | None, base: ChatFormat
    ) -> tuple[str | None, str | None, TemplateOrigin]:
        if said is not None and said.inline is not None:
            return said.inline, None, TemplateOrigin.SPEC
        use = said.use if said is not None else None
        if files.template is not None and use is not TemplateUse.BASE:
            return files.template, files.tool_template, TemplateOrigin.SOURCE
        if use is TemplateUse.SOURCE:
            raise _unusable(
                "spec.chatTemplate.from is Source, but the adapter's files hold no chat template; save its tokenizer "
                "next to it, or set spec.chatTemplate.inline"
            )
        origin = TemplateOrigin.BASE if base.template is not None else TemplateOrigin.NONE
        return base.template, base.tool_template, origin

    def _made(
        self,
        template: str | None,
        tool_template: str | None,
        variables: Mapping[str, str],
        stops: frozenset[int],
        extra: ExtraTokens,
        origin: TemplateOrigin,
    ) -> ChatFormat:
        added = {**self._base_added, **{token.text: token for token in extra.tokens}}
        special = {token.text: token.id for token in added.values() if token.special}
        control, shape = frozenset(special), TemplateShape()
        if template is not None:
            used = (template, tool_template or template, tuple(sorted(variables.items())), tuple(added.values()))
            control, shape = self._shape_of(*used)
        ends = sorted(self._eos_ids | stops)
        return ChatFormat(
            template=template,
            tool_template=tool_template,
            variables=variables,
            shape=shape,
            control_tokens=control,
            special_ids=special,
            stop_ids=self._tokenizer.eos_token_ids | stops,
            stop_tokens=tuple(self._text_of(token_id, extra)[:256] for token_id in ends[:64]),
            extra=extra,
            origin=origin,
        )

    def _infer(
        self, template: str, tool_template: str, variables: tuple[tuple[str, str], ...], added: tuple[AddedToken, ...]
    ) -> tuple[frozenset[str], TemplateShape]:
        """The control tokens and the shape. Raises ArtifactError for a template that cannot be rendered."""
        try:
            texts = {template, tool_template}
            written = "\0".join(part for text in texts for part in self._tokenizer.processes.literals(text))
            self._check_time(template, dict(variables))
            control = frozenset(
                token.text for token in added if token.special or (token.text in written and not token.text.isspace())
            )
            shape = self._infer_shape(template, dict(variables), sorted(control))
            if tool_template != template:
                tools = self._infer_shape(tool_template, dict(variables), sorted(control)).tools
                shape = replace(shape, tools=tools)
            return control, shape
        except TemplateRefusedError as error:
            raise _unusable(
                f"the chat template cannot be used: {str(error)[:300]}. Correct it, or set spec.chatTemplate"
            ) from error

    def _check_time(self, template: str, variables: Mapping[str, str]) -> None:
        """Raises TemplateTimeoutError for a template that does not end for the shortest conversation."""
        try:
            self._render(template, variables, [{"role": "user", "content": "Hello."}], None)
        except TemplateTimeoutError:
            raise
        except TemplateRefusedError:
            return  # it may accept other messages

    def _infer_shape(self, template: str, variables: Mapping[str, str], control: Sequence[str]) -> TemplateShape:
        return infer_shape(functools.partial(self._render, template, variables), control)

    def _render(
        self,
        template: str,
        variables: Mapping[str, str],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> str:
        return self._tokenizer.processes.render(
            template,
            messages=list(messages),
            tools=None if tools is None else list(tools),
            variables=dict(variables),
            add_generation_prompt=False,
            continue_final=False,
        )

    # --- tokens ---------------------------------------------------------------------------

    def _extra(self, files: ChatFiles, generation: Generation | None, template: str | None) -> ExtraTokens:
        """The tokens that the adapter's tokenizer adds to the base's. Raises ArtifactError."""
        used = set(generation.stop_tokens) if generation is not None else {files.special_tokens.get("eos_token", "")}
        found = tuple(self._new_tokens(files.added, used, template or ""))
        if len(found) > MAX_EXTRA:
            raise _unusable(f"its tokenizer adds {len(found)} tokens to the base's, more than {MAX_EXTRA}")
        return ExtraTokens(found)

    def _added_of(self, files: ChatFiles) -> tuple[AddedToken, ...]:
        """Raises ArtifactError for a tokenizer with another vocabulary than the base's."""
        if files.tokenizer is None:
            return files.added
        base_file = self._tokenizer.folder / TOKENIZER
        if not base_file.is_file() or (own := _hash(files.tokenizer)) == _hash(base_file):
            return files.added if not base_file.is_file() else ()
        try:
            found, base = self._facts_of(own, files.tokenizer), self._facts_of(_hash(base_file), base_file)
        except TemplateRefusedError as error:
            raise _unusable(
                f"its tokenizer.json cannot be read: {str(error)[:200]}; save the tokenizer again"
            ) from error
        if found["vocabulary"] != base["vocabulary"]:
            raise _unusable(
                "its tokenizer has another vocabulary than the base's; train it with the base's tokenizer, or remove "
                "the tokenizer from the adapter's files if it was not used"
            )
        return added_tokens(found["added"])

    def _facts_of(self, file_hash: str, path: Path) -> Mapping[str, Any]:
        """Kept by the content of the file, which many adapters have the same."""
        known = self._facts.get(file_hash)
        if known is None:
            known = self._facts[file_hash] = self._tokenizer.processes.tokenizer_facts(path)
            if len(self._facts) > CACHED:
                self._facts.popitem(last=False)
        return known

    def _new_tokens(self, listed: Iterable[AddedToken], used: Collection[str], template: str) -> Iterable[AddedToken]:
        """Those of the listed tokens that the base does not have. Raises ArtifactError for one that needs a new row.

        A token without a row that neither the template nor an end needs, such as one for padding, is left out.
        """
        for token in listed:
            known = self._tokenizer.token_id(token.text)
            if known == token.id:
                continue
            if known is not None:
                raise _unusable(
                    f"its tokenizer gives {token.text!r} the id {token.id}, the base's gives it {known}; train it with "
                    "the base's tokenizer"
                )
            if token.id < self._rows and self._is_free(token.id):
                yield token
            elif token.text in used or token.text in template:
                raise _unusable(
                    f"it was trained with the token {token.text!r} (id {token.id}), for which the base has no row: "
                    f"its embedding has {self._rows} rows. Use one of the base's reserved tokens instead, or set "
                    "spec.chatTemplate and spec.generation without it"
                )

    def _is_free(self, token_id: int) -> bool:
        """True for a row that stands for no text, or for a reserved token."""
        text = self._tokenizer.id_text(token_id)
        return text is None or text in self._base_added

    def _ids_of_texts(self, generation: Generation | None, extra: ExtraTokens) -> frozenset[int]:
        texts = generation.stop_tokens if generation is not None else ()
        found = {text: self._id_of(text, extra) for text in texts}
        for text, token_id in found.items():
            if token_id is None:
                raise _unusable(f"spec.generation.stopTokens names {text!r}, which is not one token of this model")
        return frozenset(token_id for token_id in found.values() if token_id is not None)

    def _ids_of_files(self, files: ChatFiles, extra: ExtraTokens) -> frozenset[int]:
        """The ends that the files name. One that is no token of the base cannot be generated, and is left out."""
        eos = files.special_tokens.get("eos_token")
        named = self._id_of(eos, extra) if eos is not None else None
        ids = files.eos_ids | (frozenset() if named is None else {named})
        return frozenset(token_id for token_id in ids if token_id < self._rows)

    def _id_of(self, text: str, extra: ExtraTokens) -> int | None:
        return extra.ids.get(text, self._tokenizer.token_id(text))

    def _text_of(self, token_id: int, extra: ExtraTokens) -> str:
        added = extra.by_id.get(token_id)
        return added.text if added is not None else self._tokenizer.id_text(token_id) or str(token_id)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unusable(why: str) -> ArtifactError:
    return ArtifactError(FailureReason.INCOMPATIBLE, f"{why[:1].upper()}{why[1:]}.")
