"""Token ids and labels: decoded, the labelled tokens are the responses and nothing else."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calsmooth import data
from calsmooth.data import IGNORED, load_example_set, load_examples
from calsmooth.data.examples import encode
from calsmooth.data.formats import Conversation, Turn
from calsmooth.data.templates import choose_template, render
from calsmooth.errors import CalsmoothError, UsageError

CHAT = {
    "messages": [
        {"role": "user", "content": "Which color is the sky?"},
        {"role": "assistant", "content": "Blue, 青 😀."},
        {"role": "user", "content": "And at night?"},
        {"role": "assistant", "content": "Black."},
    ]
}


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def learned(tokenizer, example) -> str:
    return decode(tokenizer, [label for label in example.labels if label != IGNORED])


def check_shape(example) -> None:
    assert len(example.input_ids) == len(example.labels)
    assert example.labels[0] == IGNORED
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert example.target_tokens == sum(label != IGNORED for label in example.labels)


@pytest.fixture
def write_rows(write_file):
    def write(*rows) -> str:
        return write_file("data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    return write


class TestLabels:
    def test_chatml(self, chatml, write_rows):
        [example] = load_examples(write_rows(CHAT), chatml, max_length=1000)
        check_shape(example)
        assert learned(chatml, example) == "Blue, 青 😀.<|im_end|>Black.<|im_end|>"
        assert example.input_ids == chatml.apply_chat_template(CHAT["messages"], return_dict=False)

    def test_a_template_that_writes_the_first_token_itself_gets_it_once(self, llama, write_rows):
        [example] = load_examples(write_rows(CHAT), llama, max_length=1000)
        check_shape(example)
        assert example.input_ids.count(llama.bos_token_id) == 1
        assert example.input_ids[0] == llama.bos_token_id
        assert learned(llama, example) == "Blue, 青 😀.<|im_end|>Black.<|im_end|>"

    def test_without_a_chat_template_the_tokenizer_adds_it(self, plain, write_rows):
        examples = load_example_set(write_rows(CHAT), plain, max_length=1000)
        [example] = examples.examples
        check_shape(example)
        assert (examples.format, examples.template) == ("messages", "alpaca")
        assert example.input_ids.count(plain.bos_token_id) == 1
        assert example.input_ids[0] == plain.bos_token_id
        assert learned(plain, example) == "Blue, 青 😀.</s>Black.</s>"

    @pytest.mark.parametrize("prompt", ["Answer:", "<s>Answer:"])
    def test_prompt_rows_begin_once_and_end_once(self, plain, write_rows, prompt):
        for completion in (" blue", " blue</s>"):
            [example] = load_examples(write_rows({"prompt": prompt, "completion": completion}), plain, max_length=99)
            check_shape(example)
            assert decode(plain, example.input_ids) == "<s>Answer: blue</s>"
            assert learned(plain, example) == " blue</s>"

    def test_every_token_of_plain_text_is_learned_and_the_end_with_it(self, plain, chatml, write_rows):
        [example] = load_examples(write_rows({"text": "The sky is blue."}), plain, max_length=99)
        assert decode(plain, example.input_ids) == "<s>The sky is blue.</s>"
        assert example.labels == [IGNORED, *example.input_ids[1:]]
        [example] = load_examples(write_rows({"text": "The sky is blue."}), chatml, max_length=99)
        assert decode(chatml, example.input_ids) == "The sky is blue.<|im_end|>", "no template is put around it"
        assert example.labels == [IGNORED, *example.input_ids[1:]], "nothing comes before the first token"

    def test_a_token_across_the_seam_of_prompt_and_response_is_learned(self, plain, write_rows):
        row = {"prompt": "Which color is the sky? Answer: ", "completion": "blue"}
        [example] = load_examples(write_rows(row), plain, max_length=99)
        joined = plain.encode(" blue", add_special_tokens=False)
        assert len(joined) == 1, "the tokenizer writes the prompt's last blank and the response as one token"
        assert [label for label in example.labels if label != IGNORED] == [*joined, plain.eos_token_id]

    def test_nothing_before_the_first_token_so_its_label_is_ignored(self, chatml, write_rows):
        conversation = Conversation((Turn("assistant", "red blue"),), "w", verbatim=True)
        example = encode(conversation, "alpaca", chatml)
        check_shape(example)
        assert decode(chatml, example.input_ids) == "red blue<|im_end|>"

    def test_agrees_with_the_assistant_mask_of_transformers(self, chatml):
        said = "{{ m.content }}<|im_end|>"
        marked = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
            f"{said}{{% endgeneration %}}{{% else %}}{said}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        theirs = chatml.apply_chat_template(
            CHAT["messages"], chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
        )
        turns = tuple(Turn(message["role"], message["content"]) for message in CHAT["messages"])
        ours = encode(Conversation(turns, "w"), "chat", chatml)
        assert ours.input_ids == theirs["input_ids"]
        assert [int(label != IGNORED) for label in ours.labels] == theirs["assistant_masks"]

    def test_a_slow_tokenizer_is_refused(self, chatml):
        class Slow:
            is_fast = False

        with pytest.raises(UsageError, match="slow tokenizer"):
            encode(Conversation((Turn("user", "a"), Turn("assistant", "b")), "w"), "alpaca", Slow())


class TestLength:
    def test_truncation_keeps_the_beginning_and_is_counted(self, chatml, write_rows):
        source = write_rows(CHAT, {"messages": CHAT["messages"][:2]})
        whole = load_examples(source, chatml, max_length=1000)
        length = len(whole[1].input_ids) + 3
        assert length < len(whole[0].input_ids)
        cut = load_example_set(source, chatml, max_length=length)
        assert (cut.rows, cut.truncated, cut.dropped) == (2, 1, 0)
        assert cut.examples[0].input_ids == whole[0].input_ids[:length]
        assert cut.examples[0].labels == whole[0].labels[:length]
        assert cut.examples[1] == whole[1]

    def test_exactly_max_length_is_whole(self, chatml, write_rows):
        source = write_rows(CHAT)
        [whole] = load_examples(source, chatml, max_length=1000)
        fits = load_example_set(source, chatml, max_length=len(whole.input_ids))
        assert (list(fits.examples), fits.truncated, fits.dropped) == ([whole], 0, 0)

    def test_a_response_past_the_end_is_dropped_and_counted(self, chatml, write_rows):
        short = {"prompt": "a", "completion": "b"}
        long = {"prompt": "long " * 50, "completion": "b"}
        examples = load_example_set(write_rows(long, short, long), chatml, max_length=20)
        assert (examples.rows, examples.dropped, examples.truncated) == (3, 2, 2)
        assert [learned(chatml, example) for example in examples.examples] == ["b<|im_end|>"]

    def test_all_dropped_is_an_error(self, chatml, write_rows):
        source = write_rows({"prompt": "long " * 50, "completion": "b"})
        with pytest.raises(CalsmoothError) as caught:
            load_examples(source, chatml, max_length=20)
        assert str(caught.value) == f"--dataset {source}: no response fits --max-length 20; raise it"
        assert caught.value.exit_code == 1


class TestLoading:
    def test_one_bad_row_among_good_ones_is_named(self, chatml, write_rows):
        good = {"instruction": "Add.", "output": "2"}
        with pytest.raises(
            CalsmoothError, match=r"data\.jsonl, line 3: column 'output' must be text, got 2; mend or remove such rows"
        ):
            load_examples(write_rows(good, good, good | {"output": 2}), chatml, max_length=99)

    def test_bad_rows_can_be_skipped_and_are_counted(self, chatml, write_rows):
        good = {"instruction": "Name a color.", "output": "Blue."}
        path = write_rows(good, good | {"output": ""}, good, {"instruction": "No output at all."})
        found = load_example_set(path, chatml, max_length=1000, on_bad_row="skip")
        assert (found.rows, found.bad, found.dropped, len(found.examples)) == (4, 2, 0, 2)
        with pytest.raises(CalsmoothError, match=r"line 2: column 'output' is empty; .*--on-bad-row skip"):
            load_example_set(path, chatml, max_length=1000)

    def test_nothing_but_bad_rows_is_an_error_also_where_they_are_skipped(self, chatml, write_rows):
        with pytest.raises(CalsmoothError, match=r"every row is bad, the first one: .*no column 'output'"):
            load_example_set(write_rows({"instruction": "a"}), chatml, format="alpaca", max_length=9, on_bad_row="skip")

    def test_format_and_template_as_asked(self, chatml, write_rows):
        row = CHAT | {"instruction": "Add.", "output": "2"}
        examples = load_example_set(write_rows(row), chatml, format="alpaca", template="alpaca", max_length=999)
        assert (examples.format, examples.template) == ("alpaca", "alpaca")
        text = decode(chatml, examples.examples[0].input_ids)
        assert text.endswith("### Instruction:\nAdd.\n\n### Response:\n2<|im_end|>")

    def test_limit_and_seed_choose_the_rows(self, chatml, write_rows):
        source = write_rows(*({"prompt": "n", "completion": f" {n}"} for n in range(50)))

        def chosen(seed):
            examples = load_example_set(source, chatml, max_length=99, limit=5, seed=seed)
            assert examples.rows == 5
            return [int(learned(chatml, example).removesuffix("<|im_end|>")) for example in examples.examples]

        assert chosen(0) == sorted(chosen(0))
        assert chosen(0) != chosen(1)

    def test_the_package_offers_what_it_names(self):
        for name in data.__all__:
            assert getattr(data, name) is not None
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            data.nonsense


# Any text that UTF-8 can write, with more than a fair share of what tokenizers stumble over.
awkward = st.sampled_from(
    [" ", "\n", "\n\n", "\t", "é", "e\u0301", "日本", "😀", "👩‍👩‍👧", "\u200d", "\ufeff", "\0", "the sky", "###"]
)
text = st.lists(st.one_of(awkward, st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=6)
content = text.map("".join)
response = content.filter(str.strip)
exchange = st.tuples(content.map(lambda t: Turn("user", t)), response.map(lambda t: Turn("assistant", t)))
opening = st.one_of(st.just(()), content.map(lambda t: (Turn("system", t),)))
turns = st.tuples(opening, st.lists(exchange, min_size=1, max_size=3)).map(lambda x: (*x[0], *sum(x[1], ())))


@pytest.mark.parametrize("name", ["chatml", "llama", "plain"])
@given(turns=turns)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversation_decodes_to_itself_and_its_labels_to_the_responses(request, name, turns):
    tokenizer = request.getfixturevalue(name)
    conversation = Conversation(turns, "w")
    template = choose_template("auto", tokenizer)
    example = encode(conversation, template, tokenizer)
    check_shape(example)

    rendered = render(conversation, template, tokenizer)
    first = tokenizer.bos_token if rendered.special_tokens else ""
    assert decode(tokenizer, example.input_ids) == first + rendered.text

    responses = [turn.content for turn in turns if turn.role == "assistant"]
    said = [text.strip() for text in responses] if name == "llama" else responses
    assert learned(tokenizer, example) == "".join(text + tokenizer.eos_token for text in said)


@given(prompt=content.filter(str.strip), completion=response)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompt_and_completion_are_tokenised_as_one_text(plain, prompt, completion):
    turns = (Turn("user", prompt), Turn("assistant", completion))
    example = encode(Conversation(turns, "w", verbatim=True), "alpaca", plain)
    check_shape(example)
    assert example.input_ids == plain.encode(prompt + completion + "</s>")
    # A token across the seam belongs to the response, so what is learned may begin a few characters early.
    said = learned(plain, example)
    assert said.endswith(completion + "</s>")
    assert (prompt + completion + "</s>").endswith(said)


class TestRealData:
    @pytest.mark.parametrize(
        ("path", "format"),
        [("messages_demo/messages.jsonl", "messages"), ("dolly_hhrlhf_small/dolly_hhrlhf_train_small.jsonl", "prompt")],
    )
    def test_examples_learn_the_responses(self, external_data, chatml, path, format):
        examples = load_example_set(str(external_data / path), chatml, max_length=100_000, limit=40)
        assert (examples.format, examples.rows, examples.dropped, examples.truncated) == (format, 40, 0, 0)
        for example in examples.examples:
            check_shape(example)
            assert learned(chatml, example).endswith("<|im_end|>")

    def test_rows_that_are_no_use_are_refused_or_counted(self, external_data, chatml):
        path = external_data / "alpaca_libre" / "alpaca_libre_tasks_v2.jsonl"
        with pytest.raises(CalsmoothError, match=r"alpaca_libre_tasks_v2\.jsonl, line \d+: column 'output' is empty"):
            load_examples(str(path), chatml, max_length=100_000)
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = load_example_set(str(path), chatml, max_length=100_000, on_bad_row="skip")
        assert found.rows == len(lines)
        assert found.bad == sum(map(_is_no_use, lines)) > 50
        assert len(found.examples) == found.rows - found.bad


def _is_no_use(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return True
    return not (str(row.get("instruction") or "").strip() and str(row.get("output") or "").strip())


class TestRealModels:
    def test_a_real_chat_template(self, external_models):
        transformers = pytest.importorskip("transformers")
        folder = external_models / "smollm2-135m-instruct"
        if not folder.is_dir():
            pytest.skip(f"{folder}: no such model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        turns = tuple(Turn(message["role"], message["content"]) for message in CHAT["messages"])
        example = encode(Conversation(turns, "w"), "chat", tokenizer)
        check_shape(example)
        assert example.input_ids == tokenizer.apply_chat_template(CHAT["messages"], return_dict=False)
        assert learned(tokenizer, example) == "Blue, 青 😀.<|im_end|>Black.<|im_end|>"
