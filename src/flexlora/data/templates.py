"""An example as token ids: the prompt, and the answer that is learned.

Two prompts: `chat`, the template the model's makers ship with its tokenizer, and `alpaca`, the one
of Taori et al., *Stanford Alpaca*, 2023, which the FlexLoRA paper uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from flexlora.data.task import Example

Template = Literal["chat", "alpaca"]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Tokenizer(Protocol):
    """What this room needs of a tokenizer; any Hugging Face one is it."""

    chat_template: Any
    eos_token_id: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """A mapping with `input_ids`."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool = True, add_generation_prompt: bool = False
    ) -> Any:
        """The conversation as text when `tokenize` is false."""


class AnswerTooLong(ValueError):
    """An answer that leaves no room for a prompt; a caller may skip the example and count it."""


@dataclass(frozen=True)
class Tokens:
    """One example in token ids.

    Attributes:
        prompt: what the model is given; at least one token.
        answer: what follows; its last token is the end-of-sequence one.
        labels_from: index into `prompt + answer` from which tokens are labels.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    labels_from: int

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer, as the model reads them."""
        return self.prompt + self.answer


def encode(
    example: Example,
    tokenizer: Tokenizer,
    template: Template,
    max_length: int,
    train_on_prompt: bool = False,
    system: str | None = None,
) -> Tokens:
    """An example in at most `max_length` tokens.

    A long example loses tokens at the left of its prompt; the answer is never cut. Prompt and
    answer are tokenized apart, so that generation starts from exactly the tokens trained on.

    Args:
        example: the text.
        tokenizer: of the model to be trained.
        template: `chat` or `alpaca`.
        max_length: tokens of prompt and answer together.
        train_on_prompt: labels on the prompt too.
        system: a system message; None leaves it to the chat template (some add their own).
            Before an Alpaca prompt it stands as a paragraph.

    Raises:
        AnswerTooLong: the answer, its end token and one prompt token are above `max_length`.
        ValueError: an empty answer, or a tokenizer without an end token or a chat template.
    """
    if not example.output.strip():
        raise ValueError(
            f"empty answer to {_short(example)}: there is nothing to learn from it. Remove the "
            "example, or set empty_answers: drop in the data settings."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token: answers need one. Set it before training."
        )
    prompt = _ids(tokenizer, *prompt_text(example, tokenizer, template, system))
    answer = (*_ids(tokenizer, example.output, False), int(tokenizer.eos_token_id))
    room = max_length - len(answer)
    if room < 1:
        raise AnswerTooLong(
            f"max_length {max_length}: the answer to {_short(example)} has {len(answer)} tokens "
            f"with its end token and is never cut; expected at most {max_length - 1}. "
            "Raise max_length or drop the example."
        )
    prompt = prompt[-room:]
    return Tokens(prompt, answer, 0 if train_on_prompt else len(prompt))


def prompt_text(
    example: Example, tokenizer: Tokenizer, template: Template, system: str | None = None
) -> tuple[str, bool]:
    """The prompt as text, and whether the tokenizer still has to add its special tokens.

    >>> text, _ = prompt_text(Example("Add.", "1 2", "3"), None, "alpaca")
    >>> text.splitlines()[2:]
    ['### Instruction:', 'Add.', '', '### Input:', '1 2', '', '### Response:']

    Raises:
        ValueError: an unknown template, or `chat` with a tokenizer that has no chat template.
    """
    if template == "alpaca":
        form = ALPACA_WITH_INPUT if example.input else ALPACA
        text = form.format(instruction=example.instruction, input=example.input)
        return (f"{system}\n\n{text}" if system else text), True
    if template != "chat":
        raise ValueError(f"template: {template!r}; expected 'chat' or 'alpaca'.")
    if not tokenizer.chat_template:
        raise ValueError(
            "template: 'chat', but the model's tokenizer has no chat template (a base model?). "
            "Set template: alpaca."
        )
    user = "\n\n".join(part for part in (example.instruction, example.input) if part)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": user})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return str(text), False


def _ids(tokenizer: Tokenizer, text: str, special: bool) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
    # Some tokenizers close every text; a prompt must stay open.
    return ids[:-1] if special and ids[-1:] == (tokenizer.eos_token_id,) else ids


def _short(example: Example) -> str:
    text = " ".join((example.instruction + " " + example.input).split())
    return repr(text if len(text) <= 60 else text[:57] + "...")
