"""Chat templates of the kinds that targets have, short, with tokens that the tiny target's tokenizer knows."""

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
