"""Chat templates in the manner of public models', for tests: what each reads of a chat, and how it is written."""

# As SmolLM2-135M-Instruct's, which joins strings and knows no tools.
JOINS_STRINGS = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As Qwen3's: tools as JSON in the system prompt, thoughts after the last question only, results inside a user turn. A
# message of any other role is left out without a word.
TOOLS_AND_THOUGHTS = """\
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n<tools>' }}
{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(question=-1) %}
{%- for message in messages if message.role == 'user' %}{%- set last.question = messages.index(message) %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set answer = message.content.split('</think>')[-1].lstrip('\n') %}
{{- '<|im_start|>assistant\n' }}
{%- if message.reasoning_content is string and loop.index0 > last.question %}
{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
{%- endif %}
{{- answer }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""

# As Qwen3-Coder's: arguments one by one, which a string of JSON has not.
ARGUMENTS_AS_OBJECTS = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<function=' + call.function.name + '>' }}
{%- for name, value in call.function.arguments | items %}{{- '<parameter=' + name + '>' ~ value }}{%- endfor %}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}"""

# As DeepSeek-V3's: arguments joined to the text, which an object cannot be.
ARGUMENTS_AS_JSON = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- call.function.name + '\n' + call.function.arguments }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}"""

# As those of models that see: contents are lists of parts, and a string has none.
PARTS_ONLY = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}"""

# As Llama 3.1's: results as JSON, so that quotes and line ends are escaped.
RESULTS_AS_JSON = """\
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{%- if message.role == 'tool' %}{{- message.content | tojson }}{%- else %}{{- message.content | trim }}{%- endif %}
{%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
{{- '<|eot_id|>' }}
{%- endfor %}"""
