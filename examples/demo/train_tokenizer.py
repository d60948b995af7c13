"""Train the demo's tokenizer with sentencepiece, and write it as transformers and mlx-lm read it.

    python examples/demo/train_tokenizer.py OUT

The pieces are byte-pair merges over a few megabytes of generated reports, digits one by one, with
bytes to fall back on, so that any text can be encoded.
"""

import argparse
import io
import json
import random
from pathlib import Path

import sentencepiece
from reports import sentences
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
SEED = 20261123
BOS, EOS, UNK = "<s>", "</s>", "<unk>"

# One user message: the documents and the question. The answer follows "Answer:" and ends with EOS.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{% if not loop.first %}\n\n{% endif %}{{ message['content'] }}\nAnswer:{% endif %}"
    "{% endfor %}"
)


def corpus(size: int = 3_000_000):
    rng = random.Random(SEED)
    written = 0
    while written < size:
        for count, (text, fact) in enumerate(sentences(rng, rng.uniform(0.2, 0.9))):
            written += len(text)
            yield text.replace("\n", "")
            if fact is not None:
                yield fact.question(rng)
                yield f"Answer: {fact.value}"
            if count == 200:
                break


def merges(pieces, vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order sentencepiece prefers: by its score."""
    made = []
    for piece, index in vocabulary.items():
        if not pieces.is_control(index) and not pieces.is_byte(index):
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in vocabulary and right in vocabulary:
                    made.append((-pieces.get_score(index), vocabulary[left], vocabulary[right]))
    return [
        (pieces.id_to_piece(left), pieces.id_to_piece(right)) for _, left, right in sorted(made)
    ]


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        hard_vocab_limit=False,
        num_threads=2,
        minloglevel=1,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges(pieces, vocabulary), unk_token=UNK, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex("[0-9]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)

    texts = [line for _, line in zip(range(3000), corpus())] + ["Zürich is 7 €.\n\n  tail"]
    for text in texts:
        ids = pieces.encode(text)
        if fast.encode(text, add_special_tokens=False) != ids or fast.decode(ids) != text:
            raise ValueError(f"the two tokenizers differ on {text!r}")
    print(json.dumps({"pieces": len(pieces), "compared": len(texts)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write the tokenizer into")
    main(parser.parse_args().out)
