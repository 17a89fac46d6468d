"""Chat messages to one prompt text, by the template that comes with the model."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from protos.errors import InvalidRequest, ModelUnusable


class ChatTemplate:
    """A Jinja template in a sandbox, with the names that Hugging Face templates expect."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` maps bos_token, eos_token and so on to their text. Raises `ModelUnusable`."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelUnusable(f"the model's chat template does not parse ({error}): mend it", stage="load") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_dir(cls, path: Path, settings: Mapping[str, Any]) -> "ChatTemplate | None":
        """From chat_template.jinja or `settings` (tokenizer_config.json); None where the model has none."""
        file = path / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if source is None:
            return None
        tokens = {name: _content(value) for name, value in settings.items() if name.endswith("_token") and value}
        return cls(source, {name: token for name, token in tokens.items() if token is not None})

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt up to where the assistant speaks. Raises `InvalidRequest`."""
        if not messages:
            raise InvalidRequest("a chat needs at least one message", field="chat")
        for index, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise InvalidRequest(f"message {index} has no {key}", field="chat")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # a template can fail as any program can
            raise InvalidRequest(f"the model's chat template refuses the messages: {error}", field="chat") from error


def _content(value: Any) -> str | None:
    """tokenizer_config.json gives a special token as its text or as an object that holds it."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes for HTML


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
