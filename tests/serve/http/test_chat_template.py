"""Chat templates as transformers renders them, and what they may not do."""

import json

import pytest
from serving import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from turnout.errors import CheckpointError
from turnout.serve.http import Texts
from turnout.serve.http.chat_template import ChatTemplate
from turnout.serve.http.errors import ApiError

CHAT = [
    {"role": "system", "content": "  be brief "},
    {"role": "user", "content": "a <b> & 'é 例え'"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "the cat <|endoftext|> the dog"},
]
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content | trim }}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA = """{{ bos_token }}
{%- set ns = namespace(count=0) %}
{% for m in messages %}
    {% set ns.count = ns.count + 1 %}
    {% if m['role'] == 'system' and loop.first %}
        {% continue %}
    {% endif %}
[{{ m['role'] | upper }} {{ ns.count }}] {{ m | tojson }} {{ {'b': 1, 'a': [m.content]} | tojson(indent=1) }}
    {% if not loop.last %}
        {% generation %}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{{ strftime_now('%Y') }} {{ tools is none }} {{ thinking | default('x') }} {{ dict(a=1)['a'] }}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""


def folder_of(tmp_path, tokenizer, template, *, special=None):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    special = special or {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if isinstance(template, list):
        config["chat_template"] = template
    else:
        (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def marked() -> Tokenizer:
    """One of SentencePiece's kind."""
    pieces = ["<unk>", "<|endoftext|>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA, [{"name": "default", "template": CHATML}]], ids=["chatml", "llama", "named"]
)
@pytest.mark.parametrize("kind", ["bytes", "spaced"])
def test_it_renders_and_reads_as_transformers(tmp_path, template, kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer() if kind == "bytes" else marked()
    folder = folder_of(tmp_path, tokenizer, template)
    judge = transformers.AutoTokenizer.from_pretrained(folder)
    texts = Texts.load(folder / "tokenizer.json", vocab_size=400, eos=(0,), own=False)
    for messages in (CHAT, CHAT[1:], CHAT[1:2]):
        for told in ({}, {"thinking": "deep"}):
            wanted = judge.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **told)
            assert texts.template is not None
            assert texts.template(messages, told) == wanted
            ids = judge.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **told)["input_ids"]
            assert list(texts.chat(messages, told, param="messages", where="here")) == list(ids)


def test_a_developer_is_the_system_where_the_template_knows_none():
    template = ChatTemplate("{% for m in messages %}{{ m.role }};{% endfor %}", {})
    assert template([{"role": "developer", "content": "a"}]) == "system;"
    template = ChatTemplate("{% for m in messages %}{{ m.role }};{% endfor %}{# developer #}", {})
    assert template([{"role": "developer", "content": "a"}]) == "developer;"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.no.such }}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ dict.mro() }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_said(source):
    with pytest.raises(ApiError) as found:
        ChatTemplate(source, {})([{"role": "user", "content": "a"}])
    assert (found.value.status, found.value.param) == (400, "messages")


def test_nobody_tells_a_template_what_it_is_told_already():
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(ApiError, match="besides the messages"):
        template([{"role": "user", "content": "a"}], {"messages": []})


def test_what_is_no_template(tmp_path):
    with pytest.raises(CheckpointError, match="template of Jinja"):
        ChatTemplate("{% for %}", {})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="template of Jinja"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    assert ChatTemplate.load(tmp_path) is None


def test_what_was_thought_is_told_in_the_order_of_transformers():
    template = ChatTemplate("{{ messages | tojson }}", {})
    said = template([{"role": "assistant", "content": "b", "reasoning_content": "a"}])
    assert said == '[{"thinking": "a", "role": "assistant", "content": "b", "reasoning_content": "a"}]'
