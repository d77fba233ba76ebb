"""Columns -> conversation, for every format; what doesn't fit is named with its row and column."""

import pytest

from calsmooth.data.formats import FORMATS, Turn, detect_format, to_conversation
from calsmooth.data.sources import Row, load_rows
from calsmooth.errors import CalsmoothError, UsageError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def read(format, columns):
    return to_conversation(Row(columns, "data.jsonl, line 7"), format)


def error_of(format, columns) -> str:
    with pytest.raises(CalsmoothError) as caught:
        read(format, columns)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDetection:
    @pytest.mark.parametrize(
        ("columns", "format"),
        [
            ("instruction output", "alpaca"),
            ("status instruction input output other", "alpaca"),
            ("messages", "messages"),
            ("id conversations", "sharegpt"),
            ("prompt completion", "prompt"),
            ("prompt response", "prompt"),
            ("prompt prompt_id messages", "messages"),
            ("text meta", "text"),
            ("instruction input output text", "alpaca"),
        ],
    )
    def test_by_columns_among_others(self, columns, format):
        assert detect_format(Row(dict.fromkeys(columns.split()), "w")) == format

    @pytest.mark.parametrize(("columns", "found"), [("question answer", "question, answer"), ("prompt", "prompt")])
    def test_unknown_columns_are_named_beside_the_known_formats(self, columns, found):
        with pytest.raises(CalsmoothError) as caught:
            detect_format(Row(dict.fromkeys(columns.split()), "data.csv, line 2"))
        assert f"data.csv, line 2: columns {found} fit no known format" in str(caught.value)
        for name in FORMATS:
            assert f"{name}: " in str(caught.value)

    def test_no_columns(self):
        with pytest.raises(CalsmoothError, match="columns none fit no known format"):
            detect_format(Row({}, "w"))

    def test_an_unknown_format_name_is_a_usage_error(self):
        with pytest.raises(
            UsageError, match="--format must be one of messages, sharegpt, alpaca, prompt, text, got 'dolly'"
        ):
            read("dolly", {"prompt": "a", "response": "b"})


class TestReading:
    def test_plain_text_is_all_the_models(self):
        conversation = read("text", {"text": " The sky.\n"})
        assert conversation.turns == (Turn("assistant", " The sky.\n"),)
        assert conversation.verbatim

    def test_sharegpts_column_with_the_keys_of_messages(self):
        assert read("sharegpt", {"conversations": [USER, ASSISTANT]}) == read(
            "messages", {"messages": [USER, ASSISTANT]}
        )

    @pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}])
    def test_alpaca_without_input(self, extra):
        conversation = read("alpaca", {"instruction": "Add.", "output": " 2 ", **extra})
        assert conversation.turns == (Turn("user", "Add."), Turn("assistant", " 2 "))
        assert conversation.where == "data.jsonl, line 7"
        assert not conversation.verbatim

    def test_alpaca_with_input(self):
        conversation = read("alpaca", {"instruction": "Add.", "input": "1 1", "output": "2"})
        assert conversation.turns == (Turn("user", "Add.", "1 1"), Turn("assistant", "2"))

    def test_messages(self):
        system = {"role": "system", "content": ""}
        conversation = read("messages", {"messages": [system, USER, ASSISTANT, USER, ASSISTANT]})
        assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "user", "assistant"]
        assert conversation.turns[2] == Turn("assistant", "hello")

    def test_sharegpt_roles_become_the_usual_ones(self):
        names = ["system", "human", "gpt", "user", "assistant"]
        conversation = read("sharegpt", {"conversations": [{"from": name, "value": name} for name in names]})
        assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant", "user", "assistant"]
        assert [turn.content for turn in conversation.turns] == names

    @pytest.mark.parametrize("column", ["completion", "response"])
    def test_prompt_is_kept_verbatim(self, column):
        conversation = read("prompt", {"prompt": "Q: ", column: "A"})
        assert conversation.turns == (Turn("user", "Q: "), Turn("assistant", "A"))
        assert conversation.verbatim


WORKING = {
    "alpaca": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "prompt": {"prompt": "Q: ", "completion": "A"},
}


class TestBadColumns:
    @pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}, True])
    @pytest.mark.parametrize(
        ("format", "column"), [(f, c) for f, columns in WORKING.items() for c in columns if c != "input"]
    )
    def test_wrong_type(self, format, column, value):
        message = error_of(format, WORKING[format] | {column: value})
        assert message == f"data.jsonl, line 7: column '{column}' must be text, got {value!r}"

    def test_wrong_type_of_the_optional_input(self):
        assert error_of("alpaca", WORKING["alpaca"] | {"input": 3}).endswith("column 'input' must be text, got 3")

    @pytest.mark.parametrize(
        ("format", "column"), [(f, c) for f, columns in WORKING.items() for c in columns if c != "input"]
    )
    @pytest.mark.parametrize("value", ["", " \n"])
    def test_empty(self, format, column, value):
        message = error_of(format, WORKING[format] | {column: value})
        assert message == f"data.jsonl, line 7: column '{column}' is empty"

    @pytest.mark.parametrize(
        ("format", "column"), [("alpaca", "instruction"), ("alpaca", "output"), ("prompt", "prompt")]
    )
    def test_missing(self, format, column):
        columns = {name: value for name, value in WORKING[format].items() if name != column}
        found = ", ".join(columns) or "none"
        assert f"line 7: no column '{column}'; found {found}" in error_of(format, columns)

    @pytest.mark.parametrize("value", [None, "hi", {}, []])
    @pytest.mark.parametrize(("format", "column"), [("messages", "messages"), ("sharegpt", "conversations")])
    def test_not_a_list_of_messages(self, format, column, value):
        message = error_of(format, {column: value})
        assert message == f"data.jsonl, line 7: column '{column}' must be a list of messages, got {value!r}"

    @pytest.mark.parametrize(
        ("message", "says"),
        [
            ("hello", "expected 'role' and 'content', got 'hello'"),
            ({"role": "user"}, "expected 'role' and 'content', got {'role': 'user'}"),
            ({"content": "hi"}, "expected 'role' and 'content', got {'content': 'hi'}"),
            ({"role": "tool", "content": "hi"}, "'role' must be one of system, user, assistant, got 'tool'"),
            ({"role": None, "content": "hi"}, "'role' must be one of system, user, assistant, got None"),
            ({"role": ["user"], "content": "hi"}, "'role' must be one of system, user, assistant, got ['user']"),
            ({"role": "user", "content": None}, "'content' must be text, got None"),
            ({"role": "user", "content": [{"type": "text"}]}, "'content' must be text, got [{'type': 'text'}]"),
            ({"role": "assistant", "content": " "}, "'content' must be text, got ' '"),
        ],
    )
    def test_a_bad_message_is_named_with_its_number(self, message, says):
        assert error_of("messages", {"messages": [USER, message]}) == f"data.jsonl, line 7: messages, message 2: {says}"

    def test_a_bad_sharegpt_message_is_told_in_its_own_keys(self):
        message = error_of("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]})
        assert (
            "conversations, message 1: 'from' must be one of system, human, user, gpt, assistant, got 'bot'" in message
        )

    def test_no_assistant_turn(self):
        assert (
            error_of("messages", {"messages": [USER, USER]})
            == "data.jsonl, line 7: no assistant turn, so nothing to learn"
        )

    def test_half_a_surrogate_pair_is_not_text(self):
        assert r"column 'output' isn't Unicode text: character 2 is '\ud83d'" in error_of(
            "alpaca", WORKING["alpaca"] | {"output": "x\ud83d"}
        )
        bad = {"role": "user", "content": "\ude00"}
        assert "messages, message 1: 'content' isn't Unicode text" in error_of(
            "messages", {"messages": [bad, ASSISTANT]}
        )

    def test_a_long_value_is_shortened(self):
        assert len(error_of("alpaca", WORKING["alpaca"] | {"output": ["x" * 1000]})) < 160


class TestRealFiles:
    @pytest.mark.parametrize(
        ("path", "format", "empty"),
        [
            ("alpaca_random_9k/alpaca.json", "alpaca", 4),
            ("messages_demo/messages.jsonl", "messages", 0),
            ("dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl", "prompt", 0),
        ],
    )
    def test_rows_become_conversations_except_those_without_a_response(self, external_data, path, format, empty):
        rows = load_rows(str(external_data / path))
        assert detect_format(rows[0]) == format
        refused = []
        for row in rows:
            try:
                conversation = to_conversation(row, format)
            except CalsmoothError as error:
                refused.append(str(error))
            else:
                assert conversation.turns[-1].role == "assistant"
        assert len(refused) == empty
        assert all(message.endswith("column 'output' is empty") for message in refused)
