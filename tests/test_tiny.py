"""The fixtures that the other tests stand on."""

import torch


def test_tokenizer_round_trip(tiny_tokenizer):
    text = "Two words: naïve, 2 + 2 = 4."
    assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text


def test_chat_template_ends_a_turn_with_eos(tiny_tokenizer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids = tiny_tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert ids[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(ids) == "<|user|>hi<|end|><|assistant|>ho<|end|>"


def test_folder_holds_the_same_model(tiny_model, tiny_model_dir, tiny_tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids = torch.tensor([tiny_tokenizer("abc").input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_model(ids).logits)
    assert AutoTokenizer.from_pretrained(tiny_model_dir).chat_template
