"""Documents and a question as the token ids that a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .read import Document


@dataclass(frozen=True)
class Prompt:
    """Token ids in two parts, tokenised apart so that no question moves the boundary.

    document: all up to the end of the documents; empty where there are none.
    question: the rest, up to where the answer starts.
    """

    document: list[int]
    question: list[int]

    def __len__(self) -> int:
        return len(self.document) + len(self.question)


def join_documents(documents: Sequence[Document]) -> str:
    """One text of all documents; several are each headed by a line with their name."""
    if len(documents) == 1:
        return documents[0].text
    return "\n\n".join(f"{document.name}\n{document.text}" for document in documents)


def build_prompt(
    tokenizer: TokenizerWrapper,
    documents: Sequence[Document],
    question: str,
    use_chat_template: bool = True,
) -> Prompt:
    """Put a question after the documents, as one user message where there is a chat template.

    Raises:
        ValueError: the chat template does not hold the message word for word.
    """
    text = join_documents(documents)
    message = f"{text}\n\n{question}" if text else question
    before = after = ""
    templated = use_chat_template and tokenizer.has_chat_template
    if templated:
        before, after = _around(tokenizer, message)

    def encode(part: str, special: bool) -> list[int]:
        # Not verbose: it would warn of every document over the model's trained length.
        return tokenizer.encode(part, add_special_tokens=special, verbose=False) if part else []

    split = len(before) + len(text) if text else 0
    whole = before + message + after
    # A chat template writes its special tokens out; else they belong at the very start.
    first, second = whole[:split], whole[split:]
    return Prompt(
        encode(first, special=not templated),
        encode(second, special=not templated and not first),
    )


def _around(tokenizer: TokenizerWrapper, message: str) -> tuple[str, str]:
    """What the chat template puts before and after a user message."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = rendered.partition(message)
    if not found:
        raise ValueError(
            "The model's chat template changes the text of the message, so that the end of the "
            "document cannot be found in it; use --ignore-chat-template."
        )
    return before, after
