"""What each endpoint takes, as the JSON Schemas that are published and checked against.

A field that this server does not do, and that would change the answer, is here with the values that ask for nothing,
and ``x-refused`` says why no other is taken. What changes no answer, ``user`` say, is taken and passed over.
"""

from typing import Any

__all__ = ["CHAT", "COMPLETIONS", "RESPONSES"]

Schema = dict[str, Any]
_SEED = 1 << 63


def _maybe(kind: str, **rest: Any) -> Schema:
    return {"type": [kind, "null"], **rest}


def _refused(why: str, kind: str, **nothing: Any) -> Schema:
    """A field of which only what asks for nothing is taken: null, and what ``nothing`` says."""
    return _maybe(kind, **nothing, **{"x-refused": why})


def _never(why: str) -> Schema:
    return {"type": "null", "x-refused": why}


def _text_format(**json_schema: Any) -> Schema:
    """How a text may be asked to look; ``json_schema`` is where the schema stands."""
    only = {"type": "object", "required": ["type"]}
    return {
        "anyOf": [
            {"type": "null"},
            {**only, "properties": {"type": {"type": "string", "enum": ["text", "json_object"]}}},
            {**only, **json_schema},
        ]
    }


_NAMED: Schema = {
    "name": {"type": "string", "minLength": 1, "maxLength": 64},
    "description": _maybe("string"),
    "schema": {"type": "object"},
    "strict": _maybe("boolean"),
}
_JSON_SCHEMA: Schema = {"type": "string", "enum": ["json_schema"]}
# Chat and completions have the schema in an object of its own, responses beside the type.
_RESPONSE_FORMAT = _text_format(
    required=["type", "json_schema"],
    properties={
        "type": _JSON_SCHEMA,
        "json_schema": {"type": "object", "required": ["name", "schema"], "properties": _NAMED},
    },
)
_TEXT = _maybe(
    "object",
    properties={
        "format": _text_format(required=["type", "name", "schema"], properties={"type": _JSON_SCHEMA, **_NAMED}),
        "verbosity": _refused("models are not told how much to say", "string", enum=[None, "medium"]),
    },
)
_STOP_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 1000}
_DRAWN: Schema = {
    "model": _maybe("string", description="the served name, or that of an adapter; left out: the model itself"),
    "temperature": _maybe("number", minimum=0, maximum=2, description="0 takes the likeliest token (default 1)"),
    "top_p": _maybe("number", minimum=0, maximum=1),
}
# Of this server's own, by the names that vLLM has for them.
_FURTHER: Schema = {
    "top_k": _maybe("integer", minimum=-1, maximum=1 << 31, description="0 or -1: all"),
    "min_p": _maybe("number", minimum=0, maximum=1),
    "repetition_penalty": _maybe("number", exclusiveMinimum=0, maximum=100),
    "ignore_eos": _maybe("boolean", description="go on where the model would end, to max_tokens"),
    "include_stop_str_in_output": _maybe("boolean"),
}
_SEEDED: Schema = {"seed": _maybe("integer", minimum=-_SEED, maximum=_SEED - 1)}
_HARMLESS: Schema = {
    "user": _maybe("string"),
    "metadata": _maybe("object"),
    "store": _maybe("boolean", description="taken, and nothing is kept"),
    "service_tier": _maybe("string"),
    "safety_identifier": _maybe("string"),
    "prompt_cache_key": _maybe("string"),
    "prompt_cache_retention": _maybe("string"),
}
_PENALTIES: Schema = {
    "frequency_penalty": _maybe("number", minimum=-2, maximum=2),
    "presence_penalty": _maybe("number", minimum=-2, maximum=2),
    "logit_bias": _maybe(
        "object",
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=1024,
        description="what is added to the scores of tokens, by their ids",
    ),
}
_STREAMED: Schema = {
    "stream": _maybe("boolean"),
    "stream_options": _maybe(
        "object",
        properties={
            "include_usage": _maybe("boolean"),
            "include_obfuscation": _maybe("boolean"),
            "continuous_usage_stats": _refused("usage comes with the last event", "boolean", enum=[None, False]),
        },
        additionalProperties=False,
    ),
    "n": _maybe("integer", minimum=1, maximum=128),
    "stop": {
        "anyOf": [{"type": "null"}, _STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": 4}],
    },
}
_TOKENS = _maybe("integer", minimum=1, maximum=1 << 31)
_TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": 1 << 31}
_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 128},
        {"type": "array", "items": _TOKEN, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": _TOKEN, "minItems": 1}, "minItems": 1, "maxItems": 128},
    ]
}

COMPLETIONS: Schema = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": _PROMPTS,
        **_DRAWN,
        **_FURTHER,
        **_SEEDED,
        **_STREAMED,
        **_PENALTIES,
        **_HARMLESS,
        "max_tokens": _TOKENS,
        "logprobs": _maybe("integer", minimum=0, maximum=20),
        "echo": _maybe("boolean"),
        "routes": _maybe("boolean", description="each token comes with the experts that each routed layer took for it"),
        "response_format": _RESPONSE_FORMAT,
        "best_of": _refused("all of n are given", "integer", minimum=1, maximum=1),
        "suffix": _refused("text is only gone on with", "string", maxLength=0),
    },
    "additionalProperties": False,
}

_NO_TOOLS = "no tools are called here"
_PART: Schema = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {
        "type": {"type": "string", "enum": ["text"], "x-refused": "these models read text alone"},
        "text": {"type": "string"},
    },
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]},
        "name": _maybe("string"),
        "reasoning_content": _maybe("string"),
        "refusal": _refused("no model here reads it", "string", maxLength=0),
        "audio": _never("these models read text alone"),
        "tool_calls": _refused(_NO_TOOLS, "array", maxItems=0),
        "function_call": _never(_NO_TOOLS),
        "annotations": _maybe("array"),
    },
    "additionalProperties": False,
}
_TOOLS: Schema = {
    "tools": _refused(_NO_TOOLS, "array", maxItems=0),
    "tool_choice": _refused(_NO_TOOLS, "string", enum=[None, "none", "auto"]),
    "parallel_tool_calls": _maybe("boolean"),
}

CHAT: Schema = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 10_000},
        **_DRAWN,
        **_FURTHER,
        **_SEEDED,
        **_STREAMED,
        **_PENALTIES,
        **_HARMLESS,
        **_TOOLS,
        "max_tokens": _TOKENS,
        "max_completion_tokens": _TOKENS,
        "logprobs": _maybe("boolean"),
        "top_logprobs": _maybe("integer", minimum=0, maximum=20),
        "response_format": _RESPONSE_FORMAT,
        "chat_template_kwargs": _maybe("object", description="what the checkpoint's template is told besides"),
        "functions": _refused(_NO_TOOLS, "array", maxItems=0),
        "function_call": _refused(_NO_TOOLS, "string", enum=[None, "none", "auto"]),
        "modalities": _maybe("array", items={"type": "string", "enum": ["text"]}),
        "audio": _never("these models write text alone"),
        "prediction": {"type": ["object", "null"], "description": "taken, and of no use here"},
        "reasoning_effort": _never("a template that knows it is told by chat_template_kwargs"),
        "verbosity": _refused("models are not told how much to say", "string", enum=[None, "medium"]),
        "web_search_options": _never(_NO_TOOLS),
        "moderation": _never("nothing is moderated here"),
    },
    "additionalProperties": False,
}

_INPUT_PART: Schema = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {
        "type": {
            "type": "string",
            "enum": ["input_text", "output_text", "text"],
            "x-refused": "these models read text alone",
        },
        "text": {"type": "string"},
    },
}
_ITEM: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "type": {"type": "string", "enum": ["message"], "x-refused": "messages are all that is read"},
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _INPUT_PART, "minItems": 1}]},
        "id": _maybe("string"),
        "status": _maybe("string"),
        "phase": _maybe("string"),
    },
    "additionalProperties": False,
}

RESPONSES: Schema = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": 10_000},
            ]
        },
        **_DRAWN,
        **_FURTHER,
        **_SEEDED,
        **_HARMLESS,
        **_TOOLS,
        "instructions": _maybe("string"),
        "max_output_tokens": _TOKENS,
        "stream": _maybe("boolean"),
        "stream_options": _maybe("object", properties={"include_obfuscation": _maybe("boolean")}),
        "text": _TEXT,
        "top_logprobs": _maybe("integer", minimum=0, maximum=20),
        "include": _maybe("array", items={"type": "string", "enum": ["message.output_text.logprobs"]}),
        "truncation": _refused("prompts are read whole", "string", enum=[None, "disabled"]),
        "background": _refused("answers are given at once", "boolean", enum=[None, False]),
        "previous_response_id": _never("nothing is kept: pass the whole conversation"),
        "conversation": _never("nothing is kept: pass the whole conversation"),
        "prompt": _never("no prompts are kept here"),
        "reasoning": _never("models are not told how much to think"),
        "max_tool_calls": _maybe("integer"),
        "context_management": _never("prompts are read whole"),
        "moderation": _never("nothing is moderated here"),
        "chat_template_kwargs": _maybe("object", description="what the checkpoint's template is told besides"),
    },
    "additionalProperties": False,
}
