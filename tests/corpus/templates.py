"""Chat templates of the kinds that targets have, short, with tokens that the tiny target's tokenizer knows."""

from __future__ import annotations

import json
from pathlib import Path

CHATML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Renders tool calls, as Qwen2.5 does."""

CALLS_AS_TEXT = CHATML_TOOLS.replace(
    "{'name': call.function.name, 'arguments': call.function.arguments} | tojson",
    "call.function.name + call.function.arguments",
)
"""Adds the arguments to a string, as DeepSeek V3 does: an object there is a TypeError."""

STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{{ '<|im_start|>' + ('model' if message.role == 'assistant' else 'user') + '\n' + message.content | trim }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
"""Refuses and trims as Gemma does."""

FORGETS_THOUGHTS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not loop.last and '</think>' in message.content %}"
    "{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Strips the reasoning from all but the last message."""

QWEN3 = (
    "{% set ns = namespace(last=messages | length - 1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role != 'assistant' %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% else %}"
    "{% set thought = '' %}{% set content = message.content %}"
    "{% if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Reasoning in a field of its own or in the content; kept after the last question, forgotten before it."""

PROMPT_OPENS_THOUGHT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""The generation prompt begins the reasoning, and the history has none, as DeepSeek R1 does."""

NO_PROMPT = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)
"""Has no generation prompt, and the answer begins with the space before it, as Mistral does."""

NO_END = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Ends no turn, as GLM-4 does: there the next turn's header is what the model stops at."""

MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Says itself what the assistant generates."""

MARKED_IN_MACRO = (
    "{% macro turn(message) %}"
    "{{ '<|im_start|>' + message.role + '\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ turn(message) }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
)
"""transformers misplaces markers inside a macro: it counts the header as generated and cuts off the end."""

HIDES_LATER = NO_END.replace("{{ '<|im_start|>' + m", "{% if loop.index0 < 2 %}{{ '<|im_start|>' + m").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
"""Leaves out all but the first two messages."""

# Kinds of templates that thinking and calling targets have, with headers and ends that are added tokens.

HEADERS = ("<|ask|>", "<|say|>", "<|got|>", "<|stop|>", "<|shut|>", "<|part|>", "<|call|>")
"""Added to the vocabulary; which of them are special differs between published tokenizers."""


def turns(answer: str, prompt: str = "<|say|>", tool: str = "<|got|>{{ m.content }}", end: str = "") -> str:
    """A template from what it writes for an answer, for the result of a tool and to ask for an answer.

    Args:
        end: of what users and tools say.
    """
    return (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% elif m.role == 'tool' %}}{tool}{end}"
        f"{{% else %}}<|ask|>{{{{ m.content }}}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


CALLS = (
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
)
THOUGHT_OPENED = turns("<|say|>{{ m.content.split('</think>')[-1] }}" + CALLS + "<|stop|>", "<|say|><think>\n")
"""The prompt opens a thought that the history leaves out, as DeepSeek R1, QwQ and MiniMax-M2 do."""
THOUGHT_CLOSED = turns(
    "<|say|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}{% endif %}</think>{{ m.content }}<|stop|>",
    "<|say|><think>",
)
"""The history closes at once what the prompt opens, as DeepSeek V3.2 and GLM-4.7-Flash do."""
THOUGHT_EMPTY = turns("<|say|>model\n<think></think>{{ m.content }}<|stop|>", "<|say|>model\n<think>\n")
"""Prompt and history part behind a role's name and a tag, as Nemotron 3's do."""
THOUGHT_IN_LAST = turns(
    "<|say|>{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|stop|>",
    "<|say|><think>",
)
"""The last answer alone keeps its thought."""
TWO_ENDS = turns("<|say|>{{ m.content }}<|shut|><|stop|>", end="<|shut|>")
"""A turn's end is two tokens."""
CHANNELS = turns(
    "{% if '<|part|>' in m.content %}{{ raise_exception('thoughts belong into thinking') }}{% endif %}"
    "{% if m.thinking and loop.last %}<|say|>think<|part|>{{ m.thinking }}<|shut|>{% endif %}"
    "{% if m.tool_calls %}"
    "<|say|>to={{ m.tool_calls[0].function.name }}<|part|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|say|>speak<|part|>{{ m.content }}{{ '<|stop|>' if loop.last else '<|shut|>' }}{% endif %}",
    tool="<|got|>{{ messages[loop.index0 - 1].tool_calls[0].function.name }}<|part|>{{ m.content }}",
    end="<|shut|>",
)
"""A turn is several messages, and one call is all that it has room for, as in gpt-oss's harmony."""
CALL_TOKENS = turns(
    "<|say|>{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}<|stop|>"
)
"""A call begins with a token of its own."""
ENDED_BY_HEADER = turns("<|say|>{{ m.content }}" + CALLS)
"""The next message's header is what ends a turn, as in GLM-4."""
HEADERLESS = turns("{% if loop.previtem.role != 'tool' %}<|say|>{% endif %}{{ m.content }}" + CALLS + "<|stop|>")
"""A turn that goes on after a tool's result has no header, and the prompt gives it one."""
VARIABLE = turns(
    "<|say|>{% if m.reasoning_content and think %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|stop|>",
    "<|say|>{{ tone }}{{ day or strftime_now('%Y-%m-%d') }}",
)
"""Shows thoughts if it is told to, and writes the day."""
PARTS = turns("<|say|>{% for p in m.content %}{{ p.text }}{% endfor %}<|stop|>").replace(
    "<|ask|>{{ m.content }}", "<|ask|>{% for p in m.content %}{{ p.text }}{% endfor %}"
)
"""Wants content as parts."""
UNASKED = "<|part|>You are kind.<|shut|>" + turns("<|say|>{{ m.content }}<|stop|>", "")
"""Never asks for an answer, and begins with a system prompt of its own."""
ASKS_USERS_ONLY = "<|part|>You are kind.<|shut|>" + turns(
    "<|say|>{{ m.content }}<|stop|>", "{% if messages and messages[-1].role == 'user' %}<|say|><think>{% endif %}"
)
FLAGS = turns("<|say|>{% if '/quick' in messages[0].content %}<think></think>{% endif %}{{ m.content }}<|stop|>")
"""Heeds what a user writes; so does the next, by how it begins."""
TOOL_BY_USER = turns(
    "<|say|>{% if not messages[loop.index0 - 1].content.startswith('<tool_response>') %}<think></think>{% endif %}"
    "{{ m.content }}<|stop|>"
)


def marked(template: str) -> str:
    """A template that writes its headers as `turns` does, with markers of what is generated between them."""
    head, answer, rest = template.partition("<|say|>")[0], *template.partition("<|say|>")[2].split("{% elif", 1)
    return f"{head}<|say|>{{% generation %}}{answer}{{% endgeneration %}}{{% elif{rest}"


def with_template(target: Path, template: str) -> Path:
    """A target's directory, whose chat template is replaced."""
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return target
