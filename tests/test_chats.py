"""Rows that are conversations or prompts with completions: their layouts, and what is refused."""

import json

import pytest
from chat_cases import ANSWER, CHATML, MARKED, QWEN25, TOKENIZER, TOKENS, USER, byte_bpe, read_rows, sentencepiece, told

from cascade_fast.base.chats import PromptedText, chat_layout, read_chat
from cascade_fast.base.texts import all_sequences, load_sequences, load_token_texts
from cascade_fast.input_checks import InputError
from cascade_fast.settings import make_settings

MESSAGES, CONVERSATIONS, PROMPT = ("messages",), ("conversations",), ("prompt", "completion")


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_layouts_are_told_by_columns():
    assert chat_layout(["id", "messages", "text"]) == MESSAGES
    assert chat_layout(["conversations", "system", "tools"]) == CONVERSATIONS
    assert chat_layout(["completion", "prompt"]) == PROMPT
    assert chat_layout(["prompt", "messages", "completion"]) == MESSAGES
    assert chat_layout(["prompt", "text"]) is None
    assert read_chat({"prompt": "a", "completion": "", "id": 3}, PROMPT) == PromptedText("a", "")


def test_messages(tmp_path):
    rows = [{"id": 7, "messages": [USER, ANSWER, USER, ANSWER]}, {"id": 8, "messages": [USER]}]
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yes<|im_end|>]\n"
    texts = read_rows(tmp_path, *rows)
    assert told(texts) == [turn * 2, "<|im_start|>user\nHi<|im_end|>\n"]
    assert texts[1].labelled == [False] * len(texts[1].ids)  # read and left out by whoever cuts the sequences
    everything = read_rows(tmp_path, *rows, loss_on="all")
    assert [text.labelled for text in everything] == [None, None]
    assert [text.ids for text in everything] == [text.ids for text in texts]


def test_the_sequences_of_conversations(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": "Yes " * n}]} for n in range(1, 40)]
    read_rows(tmp_path, *rows)
    settings = make_settings({"dataset": str(tmp_path / "chat.jsonl"), "seq_len": 16})
    split = load_sequences(settings, TOKENIZER)
    assert 0.3 < split.usage.labelled / split.usage.used < 0.95
    assert all_sequences(settings, TOKENIZER).tokens > split.splits["train"].tokens


def test_sharegpt_has_many_names_for_two():
    def roles(*names):
        row = {"conversations": [{"from": name, "value": name, "weight": None} for name in names]}
        return [(m["role"], m["content"]) for m in read_chat(row, CONVERSATIONS).messages]

    assert roles("system", "human", "gpt") == [("system", "system"), ("user", "human"), ("assistant", "gpt")]
    assert {role for role, _ in roles("assistant", "model", "chatgpt", "bard", "gpt")} == {"assistant"}
    assert {role for role, _ in roles("tool", "observation")} == {"tool"}
    # the same entries under the other column's name
    assert read_chat({"messages": [{"from": "human", "value": "Hi"}]}, MESSAGES).messages == [USER]
    assert read_chat({"conversations": [USER]}, CONVERSATIONS).messages == [USER]


def test_sharegpt_s_calls_and_its_columns_system_and_tools():
    call = {"name": "f", "arguments": {"x": None}}
    row = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "Yes"},
        ],
        "system": "Be kind.",
        "tools": json.dumps([{"name": "f", "default": None}]),
    }
    chat = read_chat(row, CONVERSATIONS)
    assert chat.tools == [{"name": "f", "default": None}]  # a null in JSON is what it says
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[0]["content"] == "Be kind."
    assert chat.messages[2] == {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    several = {"from": "function_call", "value": json.dumps([call, call])}
    (message,) = read_chat({"conversations": [several], "system": "", "tools": ""}, CONVERSATIONS).messages
    assert len(message["tool_calls"]) == 2


def test_what_the_reader_fills_in_is_taken_out():
    function = {"name": "f", "arguments": {"x": 1, "y": None}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": function, "id": None}], "name": None}
    row = {"messages": [{**USER, "tool_calls": None}, call], "tools": [{"name": "f", "strict": None}]}
    chat = read_chat(row, MESSAGES)
    assert chat.messages == [
        USER,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    ]
    assert chat.tools == [{"name": "f"}]
    assert read_chat({"messages": [USER], "tools": []}, MESSAGES).tools is None
    function["arguments"] = '{"x": 1}'  # as OpenAI's files have it
    assert read_chat(row, MESSAGES).messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    function["arguments"] = "x = 1"
    assert read_chat(row, MESSAGES).messages[1]["tool_calls"][0]["function"]["arguments"] == "x = 1"


def test_text_parts_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "image_url": None}]
    (text,) = read_rows(tmp_path, {"messages": [{"role": "user", "content": parts}]})
    assert told([text]) == ["<|im_start|>user\nHi<|im_end|>\n"]


def test_tools_reach_the_template(tmp_path):
    row = {"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {"name": "find"}}]}
    tokenizer = byte_bpe(TOKENS, QWEN25, plain=["<tool_call>", "</tool_call>"], eos="<|im_end|>")
    (found,) = told(read_rows(tmp_path, row, tokenizer=tokenizer), tokenizer)
    assert '<tools>\n{"type": "function", "function": {"name": "find"}}\n</tools>' in found
    assert found.endswith("<|im_start|>assistant\n[Yes<|im_end|>]\n")
    # of two templates, the one for tools
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN25}
    assert told(read_rows(tmp_path, row, tokenizer=tokenizer), tokenizer) == [found]
    assert "<tools>" not in told(read_rows(tmp_path, {"messages": [USER]}, tokenizer=tokenizer), tokenizer)[0]


# --- prompt and completion --------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_encoded_apart_and_end_with_eos(tmp_path):
    texts = read_rows(tmp_path, {"prompt": "a\n", "completion": "\nb"}, {"prompt": "", "completion": ""})
    newline = TOKENIZER("\n")["input_ids"]
    assert len(TOKENIZER("\n\n")["input_ids"]) == 1
    assert list(texts[0].ids) == [*TOKENIZER("a")["input_ids"], *newline * 2, *TOKENIZER("b")["input_ids"], 702]
    assert told(texts) == ["a\n[\nb<|im_end|>]", "[<|im_end|>]"]
    # EOS of the text's own is not doubled; special tokens are what the tokenizer makes of them, as in plain texts
    (text,) = read_rows(tmp_path, {"prompt": "<|im_start|>", "completion": "b<|im_end|>"})
    assert list(text.ids) == [701, *TOKENIZER("b")["input_ids"], 702]
    (everything,) = read_rows(tmp_path, {"prompt": "a", "completion": "b"}, loss_on="all")
    assert everything.labelled is None
    without = byte_bpe(TOKENS)
    assert told(read_rows(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer=without), without) == ["a[b]"]


def test_the_tokenizer_s_own_bos_begins_a_prompt(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_bpe(["<s>", "</s>"], bos="<s>", eos="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 700), ("</s>", 701)]
    )
    (text,) = read_rows(tmp_path, {"prompt": "Is it?", "completion": " Yes"}, tokenizer=tokenizer)
    assert told([text], tokenizer) == ["<s>Is it?[ Yes</s>]"]


def test_a_completion_after_a_prompt_of_sentencepiece(tmp_path):
    tokenizer = sentencepiece("legacy")
    (text,) = read_rows(tmp_path, {"prompt": "Is it?", "completion": " the end"}, tokenizer=tokenizer)
    assert list(text.ids) == [*tokenizer("Is it? the end")["input_ids"], tokenizer.eos_token_id]
    assert text.labelled.index(True) == len(tokenizer("Is it?")["input_ids"])


def test_messages_as_prompt_and_completion_learn_the_completion_s_answers(tmp_path):
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER], "system": "Be kind."}
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    learnt = turn.replace("Yes<|im_end|>", "[Yes<|im_end|>]")
    expected = ["<|im_start|>system\nBe kind.<|im_end|>\n" + turn + learnt * 2]
    assert told(read_rows(tmp_path, row)) == expected
    (tmp_path / "marked.jinja").write_text(MARKED)
    assert told(read_rows(tmp_path, row, chat_template=str(tmp_path / "marked.jinja"))) == expected


def test_templates_for_prompt_and_completion(tmp_path):
    asked = {"prompt_template": "{{Q}} {q} {n}:", "completion_template": " {a}!", "loss_on": "assistant"}
    rows = [{"q": "one", "n": 1, "a": True, "messages": [USER]}, {"q": "two", "n": None, "a": False, "messages": None}]
    assert told(read_rows(tmp_path, *rows, **asked)) == ["{Q} one 1:[ True!<|im_end|>]", "{Q} two :[ False!<|im_end|>]"]
    # no column in a prompt that is the same for all
    assert told(read_rows(tmp_path, rows[0], prompt_template="Say:", completion_template="{q}")) == [
        "Say:[one<|im_end|>]"
    ]
    for template, said in (
        ({"completion_template": "none"}, "completion_template: 'none'; names no column in braces; has q, n, a"),
        ({"completion_template": "{b}"}, "completion_template: 'b'; the dataset's columns are q, n, a"),
        ({"prompt_template": "{b}"}, "prompt_template: 'b'; the dataset's columns are q, n, a"),
        ({"completion_template": "{messages}"}, "row 1: messages: a list; must be text or a number"),
    ):
        with pytest.raises(InputError, match=said):
            read_rows(tmp_path, *rows, **{**asked, **template})
    with pytest.raises(InputError, match="row 2: n: null; must hold text"):
        read_rows(tmp_path, *rows, prompt_template="{n}", completion_template="{a}")


def test_what_is_asked_for_wins_over_what_the_columns_say(tmp_path):
    row = {"messages": [USER], "text": "a", "prompt": "b", "completion": "c"}
    for asked in ({"text_columns": ["prompt", "text"]}, {"text_template": "{prompt}\n{text}"}):
        (text,) = read_rows(tmp_path, row, **asked)
        assert (TOKENIZER.decode(text.ids), text.labelled) == ("b\na", None)


# --- plain texts ------------------------------------------------------------------------------------------------------


def test_numbers_are_texts_and_lists_are_not(tmp_path):
    row = {"text": "x", "n": 3, "share": 0.5, "yes": True, "null": None, "tags": ["a"], "map": {"k": 1}, "many": [USER]}
    (text,) = read_rows(tmp_path, row, text_columns=["n", "share", "yes", "null"])
    assert TOKENIZER.decode(text.ids) == "3\n0.5\nTrue\n"
    for column, kind in (("tags", "a list"), ("map", "a map"), ("many", "a list")):
        for asked in ({"text_columns": ["n", column]}, {"text_template": f"{{{column}}}"}):
            with pytest.raises(InputError, match=f"row 1: {column}: {kind}; must be text or a number"):
                read_rows(tmp_path, row, **asked)


def test_a_row_of_nulls_alone_is_refused(tmp_path):
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}]
    with pytest.raises(InputError, match=r"chat.jsonl', row 2: text: null; must hold text"):
        read_rows(tmp_path, *rows)
    assert len(read_rows(tmp_path, *rows, text_columns=["text", "n"])) == 2
    with pytest.raises(InputError, match="row 1: text, n: null; must hold text"):
        read_rows(tmp_path, {"text": None, "n": None, "other": "a"}, text_template="{text} {n}")


def test_columns_that_say_nothing(tmp_path):
    with pytest.raises(InputError, match=r"text_columns: not given, .* has columns a, b \(known .* prompt and compl"):
        read_rows(tmp_path, {"a": "x", "b": [USER]})


def test_a_chat_template_needs_conversations(tmp_path):
    template = tmp_path / "chatml.jinja"
    template.write_text(CHATML)
    with pytest.raises(InputError, match="row 1: prompt and completion are texts, for which there is no chat_templ"):
        read_rows(tmp_path, {"prompt": "a", "completion": "b"}, chat_template=str(template))
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"text": "some words"}) + "\n")
    asked = make_settings({"dataset": str(path), "chat_template": str(template)})
    with pytest.raises(InputError, match=r"chat_template: .* is read as plain texts, not as conversations"):
        load_sequences(asked, TOKENIZER)
    assert len(all_sequences(asked, TOKENIZER)) == 1  # another text than that of training is read all the same
    for asked in ({"prompt_template": "{a}", "completion_template": "{b}"}, {"text_columns": ["a"]}):
        with pytest.raises(InputError, match="pydoc has no columns"):
            list(load_token_texts(make_settings(asked), TOKENIZER).texts)


# --- rows that are refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "row", "said"),
    [
        (MESSAGES, {"text": "a"}, "has no messages"),
        (MESSAGES, {"messages": None}, "messages: null; must be given"),
        (MESSAGES, {"messages": []}, "messages: an empty list; must be a list of messages"),
        (MESSAGES, {"messages": "Hi"}, "messages: 'Hi'; must be a list of messages"),
        (MESSAGES, {"messages": ["Hi"]}, "messages, entry 1: 'Hi'; must be a map with role and content"),
        (MESSAGES, {"messages": [USER, None]}, "messages, entry 2: None; must be a map with role and content"),
        (MESSAGES, {"messages": [{"content": "Hi"}]}, "messages, entry 1: has no role; must be a map with role and co"),
        (MESSAGES, {"messages": [{"role": "user"}]}, "messages, entry 1: content: null; must be text"),
        (MESSAGES, {"messages": [{"role": "assistant", "content": None}]}, "entry 1: content: null; must be text"),
        (MESSAGES, {"messages": [{"role": "user", "content": 3}]}, "messages, entry 1: content: 3; must be text"),
        (
            MESSAGES,
            {"messages": [{"role": "boss", "content": "Hi"}]},
            "messages, entry 1: role 'boss'; must be one of system, developer, user, assistant, tool",
        ),
        (
            CONVERSATIONS,
            {"conversations": [{"from": "boss", "value": "Hi"}]},
            "conversations, entry 1: from 'boss'; must be one of system, human, user, gpt, assistant, model, chatgpt, ",
        ),
        (CONVERSATIONS, {"conversations": [{"from": "gpt", "value": None}]}, "entry 1: value: null; must be text"),
        (
            CONVERSATIONS,
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "entry 1: value: 'f(x)'; must be JSON of a function call: a map with name and arguments",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "entry 1: content: a part of type 'image'; must be text, or a list of parts of type 'text'",
        ),
        (MESSAGES, {"messages": [USER], "tools": "f(x)"}, "tools: 'f(x)'; must be a list of maps, or JSON of one"),
        (MESSAGES, {"messages": [USER], "tools": ["f"]}, "tools: a list; must be a list of maps, or JSON of one"),
        (MESSAGES, {"messages": [USER], "system": ["s"]}, "system: a list; must be text"),
        (
            MESSAGES,
            {"messages": [{"role": "system", "content": "s"}], "system": "t"},
            "system: 't'; the conversation begins with a system message, too",
        ),
        (PROMPT, {"prompt": "a", "completion": None}, "completion: null; must be given"),
        (PROMPT, {"prompt": "a", "completion": [ANSWER]}, "prompt, completion: one is text, the other is not; must be"),
        (PROMPT, {"prompt": {"a": 1}, "completion": [ANSWER]}, "prompt: a map; must be a list of messages"),
        (PROMPT, {"prompt": [USER], "completion": []}, "completion: an empty list; must be a list of messages"),
    ],
)
def test_a_row_that_is_no_conversation(layout, row, said):
    with pytest.raises(InputError) as raised:
        read_chat(row, layout)
    assert said in str(raised.value)


def test_messages_about_rows_name_file_and_row(tmp_path):
    alternate = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate\nuser/assistant') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    for template, row, said in (
        (CHATML, {"messages": None}, "messages: null; must be given"),
        (CHATML, {"messages": [{"role": "boss", "content": "Hi"}]}, "messages, entry 1: role 'boss'; must be one of "),
        (
            alternate,
            {"messages": [USER, USER]},
            "the base's chat template cannot write this conversation: roles must alternate user/assistant",
        ),
        (
            "{{ messages[3].content }}",
            {"messages": [USER]},
            "the base's chat template cannot write this conversation: ",
        ),
    ):
        with pytest.raises(InputError) as raised:
            read_rows(
                tmp_path,
                {"messages": [USER]},
                row,
                {"messages": [USER]},
                tokenizer=byte_bpe(TOKENS, template, eos="<|im_end|>"),
            )
        number = 1 if "[3]" in template else 2
        assert str(raised.value).startswith(f"dataset: {str(tmp_path / 'chat.jsonl')!r}, row {number}: {said}")
        assert "\n" not in str(raised.value)
