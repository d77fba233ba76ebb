"""The text of a conversation, and which stretches of it the assistant says."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from calsmooth.data.examples import IGNORED, encode
from calsmooth.data.formats import Conversation, Turn
from calsmooth.data.templates import as_chat_template, choose_template, render
from calsmooth.errors import CalsmoothError, UsageError

SYSTEM = Turn("system", "Be brief.")
FIRST = (Turn("user", "Which color is the sky?"), Turn("assistant", "Blue."))
SECOND = (Turn("user", "And at night?"), Turn("assistant", "Black. "))


def rendered(turns, template, tokenizer, verbatim=False):
    return render(Conversation(tuple(turns), "data.jsonl, line 7", verbatim), template, tokenizer)


def said(result) -> list[str]:
    return [result.text[start:end] for start, end in result.spans]


class TestChoice:
    def test_auto_is_chat_where_there_is_a_chat_template(self, chatml, plain):
        assert choose_template("auto", chatml) == "chat"
        assert choose_template("auto", plain) == "alpaca"
        assert choose_template("alpaca", chatml) == "alpaca"

    def test_chat_without_a_chat_template_is_a_usage_error(self, plain):
        with pytest.raises(UsageError, match="--template chat: this model's tokenizer has no chat template"):
            choose_template("chat", plain)

    def test_an_unknown_name_is_a_usage_error(self, chatml):
        with pytest.raises(UsageError, match="--template must be one of auto, chat, alpaca, tulu, got 'vicuna'"):
            choose_template("vicuna", chatml)


class TestAlpaca:
    def test_without_input_is_the_published_template(self, plain):
        result = rendered(FIRST, "alpaca", plain)
        assert result.text == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nWhich color is the sky?\n\n### Response:\nBlue.</s>"
        )
        assert said(result) == ["Blue.</s>"]
        assert result.special_tokens

    def test_with_input_is_the_published_template(self, plain):
        result = rendered((Turn("user", "Add.", "1 and 1"), Turn("assistant", "2")), "alpaca", plain)
        assert result.text == (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 and 1\n\n### Response:\n2</s>"
        )
        assert said(result) == ["2</s>"]

    def test_more_turns_repeat_the_sections_and_a_system_message_takes_the_place_of_the_introduction(self, plain):
        result = rendered((SYSTEM, *FIRST, *SECOND), "alpaca", plain)
        assert result.text == (
            "Be brief.\n\n### Instruction:\nWhich color is the sky?\n\n### Response:\nBlue.</s>"
            "\n\n### Instruction:\nAnd at night?\n\n### Response:\nBlack. </s>"
        )
        assert said(result) == ["Blue.</s>", "Black. </s>"]

    def test_a_tokenizer_without_an_end_token_ends_with_the_response(self, chatml):
        chatml.eos_token, eos = None, chatml.eos_token
        try:
            assert said(rendered(FIRST, "alpaca", chatml)) == ["Blue."]
        finally:
            chatml.eos_token = eos


class TestPrompt:
    def test_is_left_as_it_is_whatever_the_template(self, chatml):
        turns = (Turn("user", "Q: 1+1? A:"), Turn("assistant", " 2"))
        for template in ("chat", "alpaca"):
            result = rendered(turns, template, chatml, verbatim=True)
            assert result.text == "Q: 1+1? A: 2<|im_end|>"
            assert said(result) == [" 2<|im_end|>"]

    def test_marks_that_the_text_brings_are_not_written_twice(self, plain):
        result = rendered((Turn("user", "<s>Q: "), Turn("assistant", "A</s>")), "alpaca", plain, verbatim=True)
        assert result.text == "<s>Q: A</s>"
        assert said(result) == ["A</s>"]
        assert not result.special_tokens


class TestChat:
    def test_every_assistant_turn_with_its_end_mark_and_without_the_line_break_after_it(self, chatml):
        result = rendered((SYSTEM, *FIRST, *SECOND), "chat", chatml)
        assert result.text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nWhich color is the sky?<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
            "<|im_start|>user\nAnd at night?<|im_end|>\n<|im_start|>assistant\nBlack. <|im_end|>\n"
        )
        assert said(result) == ["Blue.<|im_end|>", "Black. <|im_end|>"]
        assert not result.special_tokens

    def test_a_template_that_trims_messages_has_its_way(self, llama):
        result = rendered((*FIRST, *SECOND), "chat", llama)
        assert result.text.startswith("<s><|header|>user<|/header|>\n\nWhich")
        assert said(result) == ["Blue.<|im_end|>", "Black.<|im_end|>"]

    def test_a_template_that_marks_the_assistants_part_is_taken_at_its_word(self, marked, chatml):
        result = rendered((SYSTEM, *FIRST, *SECOND), "chat", marked)
        assert result.text == rendered((SYSTEM, *FIRST, *SECOND), "chat", chatml).text
        assert said(result) == ["Blue.<|im_end|>", "Black. <|im_end|>"]
        assert not result.special_tokens

    def test_a_marked_part_may_stand_in_a_text_that_grows_by_rewriting(self, forgetful):
        template = forgetful.chat_template.replace(
            "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
        )
        forgetful.chat_template, before = template, forgetful.chat_template
        try:
            assert said(rendered((*FIRST, *SECOND), "chat", forgetful))[-1] == "Black. <|im_end|>"
        finally:
            forgetful.chat_template = before

    def test_turns_after_the_last_response_are_read_and_not_learned(self, chatml):
        result = rendered((*FIRST, Turn("user", "Thanks.")), "chat", chatml)
        assert result.text.endswith("user\nThanks.<|im_end|>\n")
        assert said(result) == ["Blue.<|im_end|>"]

    def test_alpacas_input_follows_the_instruction(self, chatml):
        result = rendered((Turn("user", "Add.", "1 and 1"), Turn("assistant", "2")), "chat", chatml)
        assert "user\nAdd.\n\n1 and 1<|im_end|>" in result.text

    def test_a_template_that_rewrites_earlier_turns_is_refused(self, forgetful):
        with pytest.raises(CalsmoothError) as caught:
            rendered((*FIRST, *SECOND), "chat", forgetful)
        assert str(caught.value) == (
            "data.jsonl, line 7: the chat template rewrites earlier text when a turn is added, so the assistant's "
            "part can't be told; use --template alpaca"
        )
        assert caught.value.exit_code == 1

    def test_the_same_template_will_do_for_a_single_turn(self, forgetful):
        assert said(rendered(FIRST, "chat", forgetful)) == ["Blue.<|im_end|>"]

    def test_a_conversation_that_the_template_refuses(self, strict):
        with pytest.raises(CalsmoothError) as caught:
            rendered((SYSTEM, *FIRST), "chat", strict)
        assert str(caught.value) == (
            "data.jsonl, line 7: the chat template refuses this conversation (System role not supported)"
        )

    def test_a_conversation_that_the_assistant_starts(self, chatml, plain):
        turns = (Turn("assistant", "Hello!"), *FIRST)
        with pytest.raises(CalsmoothError, match=r"line 7: starts with the assistant.*use --template alpaca"):
            rendered(turns, "chat", chatml)
        assert said(rendered(turns, "alpaca", plain)) == ["Hello!</s>", "Blue.</s>"]


class TestTulu:
    def test_is_open_instructs_template(self, plain):
        result = rendered((SYSTEM, *FIRST, *SECOND), "tulu", plain)
        assert result.text == (
            "<|system|>\nBe brief.\n<|user|>\nWhich color is the sky?\n<|assistant|>\nBlue.</s>"
            "\n<|user|>\nAnd at night?\n<|assistant|>\nBlack. </s>"
        )
        assert said(result) == ["Blue.</s>", "Black. </s>"]
        assert result.special_tokens

    def test_alpacas_input_follows_the_instruction(self, plain):
        result = rendered((Turn("user", "Add.", "1 and 1"), Turn("assistant", "2")), "tulu", plain)
        assert result.text == "<|user|>\nAdd.\n\n1 and 1\n<|assistant|>\n2</s>"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [" ", "\n", "Add. ", "### Input:\nno", "{{ m.content }}", "ends with </s>", "ends with <|im_end|>", "'quoted'"]
)
NOT_EMPTY = TEXTS.filter(str.strip)
PAIRS = st.tuples(st.builds(Turn, st.just("user"), TEXTS, TEXTS), st.builds(Turn, st.just("assistant"), NOT_EMPTY))
SYSTEMS = st.builds(Turn, st.just("system"), NOT_EMPTY)
CONVERSATIONS = st.builds(
    lambda system, first, pairs, last: (*system, *first, *(turn for pair in pairs for turn in pair), *last),
    st.lists(SYSTEMS, max_size=2),
    st.lists(st.builds(Turn, st.just("assistant"), NOT_EMPTY), max_size=1),
    st.lists(PAIRS, min_size=1, max_size=3),
    st.lists(st.builds(Turn, st.just("user"), TEXTS, TEXTS), max_size=1),
)
TOKENIZERS = ["plain", "chatml", "llama", "sentencepiece", "endless"]


def as_messages(turns):
    """With an `input` where a turn has one, as a user would write them."""
    return [
        {"role": t.role, "content": t.content} | ({"input": t.input} if t.input else {}) for t in turns
    ]  # fmt: skip


class TestAsChatTemplate:
    @pytest.mark.parametrize("template", ["alpaca", "tulu"])
    @pytest.mark.parametrize("name", TOKENIZERS)
    @given(turns=CONVERSATIONS)
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_has_the_tokens_and_labels_of_training_for_rows_of_every_shape(self, request, template, name, turns):
        tokenizer = request.getfixturevalue(name)
        trained = encode(Conversation(turns, "here"), template, tokenizer)
        asked = tokenizer.apply_chat_template(
            as_messages(turns),
            chat_template=as_chat_template(template, tokenizer),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert asked["input_ids"] == trained.input_ids
        labels = [
            token if mask else IGNORED for token, mask in zip(trained.input_ids, asked["assistant_masks"], strict=True)
        ]
        assert labels == trained.labels

    @pytest.mark.parametrize("template", ["alpaca", "tulu"])
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_a_tokenizer_that_carries_it_goes_on_with_that_layout(self, request, template, name, tmp_path):
        original = request.getfixturevalue(name)
        original.save_pretrained(tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        tokenizer.chat_template = as_chat_template(template, tokenizer)
        tokenizer.save_pretrained(tmp_path / "trained")
        saved = AutoTokenizer.from_pretrained(tmp_path / "trained")
        assert choose_template("auto", saved) == choose_template("chat", saved) == template
        assert choose_template("tulu", saved) == "tulu"
        row = Conversation((Turn("user", "Add.", "1 and 1"), Turn("assistant", "2")), "here")
        assert encode(row, choose_template("auto", saved), saved) == encode(row, template, original)

    @pytest.mark.parametrize("template", ["alpaca", "tulu"])
    @pytest.mark.parametrize("turns", [FIRST, (SYSTEM, *FIRST, *SECOND), (*FIRST, Turn("user", "Thanks."))])
    @pytest.mark.parametrize("name", ["plain", "chatml"])
    def test_is_the_text_that_was_trained_on(self, request, template, turns, name):
        tokenizer = request.getfixturevalue(name)
        built_in = rendered(turns, template, tokenizer)
        as_chat = as_chat_template(template, tokenizer)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        ids = tokenizer(built_in.text)["input_ids"]
        assert tokenizer.apply_chat_template(messages, chat_template=as_chat, return_dict=False) == ids
        masked = tokenizer.apply_chat_template(
            messages, chat_template=as_chat, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = [i for i, mask in zip(ids, masked["assistant_masks"], strict=True) if mask]
        assert tokenizer.decode(learned) == "".join(said(built_in))

    @pytest.mark.parametrize("template", ["alpaca", "tulu"])
    def test_asks_with_what_comes_before_a_response(self, plain, template):
        prompt = plain.apply_chat_template(
            [{"role": "user", "content": "Which color is the sky?"}],
            chat_template=as_chat_template(template, plain),
            add_generation_prompt=True,
            tokenize=False,
        )
        whole = rendered(FIRST, template, plain)
        assert prompt == plain.bos_token + whole.text[: whole.spans[0][0]]

    def test_a_models_own_is_left(self, chatml):
        assert as_chat_template("chat", chatml) is None
