"""ChatTemplate: the words and marks that a conversation is written down with, as a jinja source.

A template is code out of a model folder, so it runs in jinja's immutable sandbox, with the few extras that templates in
the wild count on (see "Chat templates" in the documentation of transformers). It makes text; tokens and loss mask are
the renderer's business.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.data.conversation import Message
from core.data.tokenizer import Tokenizer
from core.errors import InvalidInput, Problem

Choice = Literal["model", "chatml", "alpaca"]

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# The alpaca parser has joined `input` to the instruction, so there is no "### Input:" here. A system message takes the
# place of the preamble.
ALPACA = """\
{%- set preamble = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set preamble = messages[0].content -%}
{%- endif -%}
{{ (bos_token or '') + preamble }}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '\\n\\n### Instruction:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' -%}
{{ '### Response:\\n' + message.content + (eos_token or '') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '### Response:\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A named jinja source. Two templates with one digest write the same text."""

    name: str
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def text(self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> str:
        """A conversation as text. Raises InvalidInput (template-error) when the template refuses it or is broken."""
        try:
            return _compile(self.source).render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **tokenizer.named,
            )
        except Exception as error:  # a template may divide by zero as well as raise_exception
            message = f"the chat template {self.name} refuses the conversation: {error}"
            raise InvalidInput(message, [Problem("template-error", message)]) from None


def choose_template(choice: Choice, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that a job asks for; `model` is the model's own, or ChatML where it has none."""
    if choice == "alpaca":
        return ChatTemplate("alpaca", ALPACA)
    if choice == "model" and tokenizer.chat_template is not None:
        return ChatTemplate("model", tokenizer.chat_template)
    return ChatTemplate("chatml", CHATML)


class _Generation(Extension):
    """`{% generation %}` marks the answer for others; the loss mask is found without it, so it only has to be read."""

    tags = {"generation"}  # noqa: RUF012  jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja's own escapes HTML, which is no business of a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  templates mean the wall clock
