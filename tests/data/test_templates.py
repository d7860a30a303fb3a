"""Prompt and answer in token ids: what is cut, what is learned, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.data.task import Example
from flexlora.data.templates import ALPACA, AnswerTooLong, encode, prompt_text

EXAMPLE = Example("Add.", "1 2", "3")


def test_chat_prompt_is_the_template_with_its_generation_prompt(tiny_tokenizer):
    tokens = encode(EXAMPLE, tiny_tokenizer, "chat", 100)
    prompt = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Add.\n\n1 2"}], add_generation_prompt=True, tokenize=False
    )
    assert tiny_tokenizer.decode(list(tokens.prompt)) == prompt
    assert tiny_tokenizer.decode(list(tokens.answer)) == "3<|end|>"
    assert tokens.labels_from == len(tokens.prompt)
    assert tokens.ids == tokens.prompt + tokens.answer


def test_alpaca_prompt_without_and_with_input(tiny_tokenizer):
    bare = encode(Example("Go.", "", "ok"), tiny_tokenizer, "alpaca", 500)
    assert tiny_tokenizer.decode(list(bare.prompt)) == ALPACA.format(instruction="Go.")
    text, _ = prompt_text(EXAMPLE, tiny_tokenizer, "alpaca")
    assert "### Input:\n1 2\n\n### Response:" in text


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_system_message_comes_first(tiny_tokenizer, template):
    text, _ = prompt_text(EXAMPLE, tiny_tokenizer, template, "Be brief.")
    assert text.startswith(("<|system|>Be brief.", "Be brief.\n\n"))


def test_braces_in_the_data_are_text(tiny_tokenizer):
    text, _ = prompt_text(Example("{x}", "{0}", "y"), tiny_tokenizer, "alpaca")
    assert "{x}" in text
    assert "{0}" in text


@given(
    prompt=st.text(max_size=60), answer=st.text(min_size=1, max_size=20), room=st.integers(1, 99)
)
def test_only_the_left_of_the_prompt_is_cut(tiny_tokenizer, prompt, answer, room):
    example = Example(prompt, "", "." + answer)
    whole = encode(example, tiny_tokenizer, "chat", 10_000)
    max_length = len(whole.answer) + room
    cut = encode(example, tiny_tokenizer, "chat", max_length)
    assert cut.answer == whole.answer
    assert cut.prompt == whole.prompt[-room:]
    assert len(cut.ids) <= max_length


def test_labels_on_the_prompt(tiny_tokenizer):
    assert encode(EXAMPLE, tiny_tokenizer, "chat", 100, train_on_prompt=True).labels_from == 0


def test_an_answer_without_room_says_so(tiny_tokenizer):
    long = Example("Count.", "", "x" * 30)
    assert len(encode(long, tiny_tokenizer, "chat", 32).prompt) == 1
    with pytest.raises(AnswerTooLong, match=r"max_length 31: .*'Count.'.* 31 tokens"):
        encode(long, tiny_tokenizer, "chat", 31)


@pytest.mark.parametrize("output", ["", " \n"])
def test_an_empty_answer_is_refused(tiny_tokenizer, output):
    with pytest.raises(ValueError, match=r"empty answer to 'Add.'.*empty_answers: drop"):
        encode(Example("Add.", "", output), tiny_tokenizer, "chat", 100)


def test_a_base_model_has_no_chat_template(tiny_tokenizer):
    class Bare:
        chat_template, eos_token_id = None, 1

    with pytest.raises(ValueError, match="template: alpaca"):
        encode(EXAMPLE, Bare(), "chat", 100)
    with pytest.raises(ValueError, match="'chta'; expected"):
        encode(EXAMPLE, tiny_tokenizer, "chta", 100)
    Bare.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token"):
        encode(EXAMPLE, Bare(), "alpaca", 100)
