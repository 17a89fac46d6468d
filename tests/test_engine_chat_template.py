"""Chat templates run in a sandbox, with the names that Hugging Face templates expect."""

import datetime

import pytest

from engine.chat_template import ChatTemplate
from protos.errors import InvalidRequest, ModelUnusable
from tiny_model import CHAT_TEMPLATE

HI = [{"role": "user", "content": "hi"}]


def render(source, messages=HI, **special_tokens):
    return ChatTemplate(source, special_tokens).render(messages)


def test_the_prompt_ends_where_the_assistant_speaks():
    assert render(CHAT_TEMPLATE) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_names_that_templates_expect():
    assert render("{{ bos_token }}{{ messages | length }}", bos_token="<s>") == "<s>1"
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi"}]'
    assert render("{{ '<é>' | tojson }}") == '"<é>"'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    assert render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}") == ""
    assert render("{% if tools is defined %}tools{% endif %}") == ""


def test_blocks_take_their_line_breaks_along():
    assert render("{% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n") == "  hi\n"


def test_from_dir_prefers_the_file(tmp_path):
    settings = {"chat_template": "settings", "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    assert ChatTemplate.from_dir(tmp_path, settings).render(HI) == "settings"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    assert ChatTemplate.from_dir(tmp_path, settings).render(HI) == "<s></s>"


def test_from_dir_takes_the_default_of_several(tmp_path):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert ChatTemplate.from_dir(tmp_path, {"chat_template": several}).render(HI) == "plain"
    assert ChatTemplate.from_dir(tmp_path, {"chat_template": several[:1]}) is None
    assert ChatTemplate.from_dir(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], "message 0 has no content"),
        ([*HI, {"content": "x"}], "message 1 has no role"),
        ([{"role": "user", "content": None}], "message 0 has no content"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(InvalidRequest, match=message) as raised:
        render(CHAT_TEMPLATE, messages)
    assert raised.value.field == "chat"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[5].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 12) | list }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_refuses(source):
    with pytest.raises(InvalidRequest, match="chat template refuses the messages") as raised:
        render(source)
    assert raised.value.field == "chat"


def test_a_template_that_does_not_parse():
    with pytest.raises(ModelUnusable, match="does not parse"):
        ChatTemplate("{% for %}", {})
