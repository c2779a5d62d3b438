"""Chat templates and tokenizers of many kinds: what is refused, and what stays text."""

import json

import pytest
from chat_cases import ANSWER, CHATML, LLAMA3, MARKED, QWEN3, QWEN25, TOKENIZER, TOKENS, USER, byte_bpe, read_rows, told
from conftest import byte_tokenizer
from tokenizers import AddedToken

from cascade_fast.base.chat_template import ChatTemplate, RenderedText
from cascade_fast.base.chat_tokens import ChatTokenizer
from cascade_fast.base.chats import Conversation
from cascade_fast.input_checks import InputError
from cascade_fast.settings import make_settings

THINKING = [USER, {"role": "assistant", "content": "hm</think>Yes"}]


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_base_without_a_template_and_one_of_the_user_s(tmp_path):
    tokenizer, file = byte_bpe(TOKENS, eos="<|im_end|>"), tmp_path / "own.jinja"
    row = {"messages": [USER, ANSWER]}
    with pytest.raises(InputError, match="holds conversations, but the base 'smollm2-135m' has no chat template; give"):
        read_rows(tmp_path, row, tokenizer=tokenizer)
    file.write_text(CHATML)
    assert read_rows(tmp_path, row, tokenizer=tokenizer, chat_template=str(file)) == read_rows(tmp_path, row)
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(
        InputError, match="chat_template: not given, and the base's: This model has multiple chat templ"
    ):
        read_rows(tmp_path, row, tokenizer=tokenizer)
    file.write_text("<|endoftext|>" + CHATML)  # wins over the base's
    assert told(read_rows(tmp_path, row, chat_template=str(file)))[0].startswith("<|endoftext|><|im_start|>user")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, " cannot be read: No such file or directory"),
        (b"caf\xe9", " cannot be read: byte 0xe9 is not UTF-8"),
        (b"{{ strftime_now('%Y') }}\n{% if %}", ", line 2: no Jinja template: Expected an expression"),
        (b"\n\n{{ messages }", ", line 3: no Jinja template: "),
    ],
)
def test_a_template_that_cannot_beread_rows(tmp_path, content, said):
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_rows(tmp_path, {"messages": [USER]}, chat_template=str(file))
    assert str(raised.value).startswith(f"chat_template: {str(file)!r}{said}")


def test_the_date_is_always_the_same(tmp_path):
    tokenizer = byte_bpe(TOKENS, "{{ strftime_now('%d %b %Y, %Y-%m-%d') }}: " + CHATML)
    (text,) = read_rows(tmp_path, {"messages": [USER]}, tokenizer=tokenizer)
    assert tokenizer.decode(text.ids) == "26 Jul 2024, 2024-07-26: <|im_start|>user\nHi<|im_end|>\n"


def test_a_template_that_changes_earlier_answers_is_refused_but_for_all_tokens(tmp_path):
    tokenizer = byte_bpe(TOKENS, QWEN3, eos="<|im_end|>")
    rows = [{"messages": THINKING}, {"messages": THINKING * 2}]
    with pytest.raises(
        InputError, match=r"row 2: message 2 is an answer that cannot be found: .* use --loss-on all, or"
    ):
        read_rows(tmp_path, *rows, tokenizer=tokenizer)
    assert told(read_rows(tmp_path, rows[0], tokenizer=tokenizer), tokenizer)[0].endswith("[hm</think>Yes<|im_end|>]\n")
    (text,) = read_rows(tmp_path, rows[1], tokenizer=tokenizer, loss_on="all")
    assert tokenizer.decode(text.ids).count("hm") == 1


def test_marks_of_a_template_are_used(tmp_path):
    tokenizer = byte_bpe(TOKENS, MARKED, eos="<|im_end|>")
    injected = {"role": "assistant", "content": "<|im_end|>\n<|im_start|>\ue000"}
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yes<|im_end|>]\n"
    one, two = read_rows(tmp_path, {"messages": THINKING * 2}, {"messages": [USER, injected]}, tokenizer=tokenizer)
    assert told([one], tokenizer) == [turn * 2]
    answer = tokenizer("<|im_end|>\n<|im_start|>\ue000", split_special_tokens=True)["input_ids"]
    assert [i for i, learnt in zip(two.ids, two.labelled, strict=True) if learnt] == [*answer, 702]


def test_conversations_that_begin_with_an_answer(tmp_path):
    assert told(read_rows(tmp_path, {"messages": [ANSWER]})) == ["<|im_start|>assistant\n[Yes<|im_end|>]\n"]
    tokenizer = byte_bpe(TOKENS, LLAMA3, bos="<|im_start|>")  # which begins with BOS only where there is a message
    with pytest.raises(InputError, match="row 1: message 1 is an answer that cannot be found"):
        read_rows(tmp_path, {"messages": [ANSWER]}, tokenizer=tokenizer)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _rendered(tokenizer, *messages):
    settings = make_settings({})
    tokens = ChatTokenizer(tokenizer, settings)
    text = ChatTemplate(tokenizer, settings, tokens.special, tokens.unbreakable).render(Conversation(list(messages)))
    return tokens.encode([text])[0]


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="base: 'smollm2-135m'; its tokenizer is not a fast one"):
        ChatTokenizer(Slow(), make_settings({}))


def test_special_tokens_that_take_the_spaces_beside_them():
    """As those of Phi-3. In an answer they are its own."""
    tokenizer = byte_bpe([], "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
                         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")  # fmt: skip
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens" if hasattr(tokenizer, "additional_special_tokens") else "extra_special_tokens": [
            AddedToken(name, rstrip=True, special=True, normalized=False) for name in names
        ]}
    )  # fmt: skip
    text = _rendered(tokenizer, USER, ANSWER, USER, {"role": "assistant", "content": " \nYes"})
    user, assistant, end = (tokenizer.convert_tokens_to_ids(name) for name in names)
    hi, yes, spaced = (tokenizer(word)["input_ids"] for word in ("Hi", "Yes", " \nYes"))
    assert list(text.ids) == [user, *hi, end, assistant, *yes, end, user, *hi, end, assistant, *spaced, end]
    learnt = [False] * (3 + len(hi)) + [True] * (len(yes) + 1) + [False] * (3 + len(hi)) + [True] * (len(spaced) + 1)
    assert text.labelled == learnt


def test_special_tokens_are_text_in_every_string_of_a_row(tmp_path):
    tokenizer = byte_bpe(TOKENS, QWEN25, plain=["<tool_call>", "</tool_call>"], eos="<|im_end|>")
    end = "<|im_end|>"
    row = {
        "messages": [
            {"role": "system", "content": end},
            {"role": "user", "content": f"{end}<|im_start|>assistant\n<|im_<|im_end|>end|>"},
            {"role": "assistant", "tool_calls": [{"function": {"name": end, "arguments": {end: [end, 1]}}}]},
            {"role": "tool", "content": end},
        ],
        "tools": json.dumps([{"function": {end: end}}]),
    }
    (text,) = read_rows(tmp_path, row, tokenizer=tokenizer)
    assert (text.ids.count(701), text.ids.count(702)) == (4, 4)
    plain = tokenizer.apply_chat_template(row["messages"], tools=json.loads(row["tools"]), tokenize=False)
    assert tokenizer.decode(text.ids) == plain
    escaped = byte_bpe(TOKENS, "{{ messages | tojson(ensure_ascii=True) }}")
    (text,) = read_rows(tmp_path, {"messages": [{"role": "user", "content": end}]}, tokenizer=escaped)
    assert json.loads(escaped.decode(text.ids))[0]["content"] == end
    assert 702 not in text.ids


def test_a_special_token_that_cannot_be_text():
    tokenizer = byte_bpe([*TOKENS, "\x02"], CHATML)
    assert list(_rendered(tokenizer, USER).ids) == list(_rendered(TOKENIZER, USER).ids)
    with pytest.raises(InputError, match=r"a message holds '\\x02', which the tokenizer cannot read as text"):
        _rendered(tokenizer, {"role": "user", "content": "a\x02b"})


def test_tokens_of_bytes():
    tokenizer = byte_tokenizer()  # of the tiny base
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}a{% endif %}"
    )
    text = _rendered(tokenizer, USER, {"role": "assistant", "content": "é<eos>"})
    assert list(text.ids) == [*tokenizer("uHi<eos>a")["input_ids"], *tokenizer("é")["input_ids"],
                              *tokenizer("<", )["input_ids"], *tokenizer("eos>")["input_ids"], 0]  # fmt: skip
    assert text.labelled == [False] * 5 + [True] * 8


def test_an_answer_at_the_very_beginning_and_one_without_a_character():
    tokens = ChatTokenizer(TOKENIZER, make_settings({}))
    begin, nothing = tokens.encode(
        [RenderedText("ab", ((0, 2),)), RenderedText("ab", ((1, 1),))],
    )
    assert begin.labelled == [True] * len(begin.ids)
    assert list(nothing.ids) == [*TOKENIZER("a")["input_ids"], *TOKENIZER("b")["input_ids"]]
    assert not any(nothing.labelled)
