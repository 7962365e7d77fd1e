"""Tokenizers: trained on the text, or the user's own."""

from __future__ import annotations

import pytest
from small_data import decoded, load, prose, vars_of
from transformers import PreTrainedTokenizerFast

from dist_lowrank.config.schema import TextData
from dist_lowrank.training.data.corpus import open_corpus
from dist_lowrank.training.data.tokenizer import encode, train_tokenizer


def test_any_text_survives_the_trained_tokenizer(tmp_path):
    tokenizer = train_tokenizer([prose(500, seed=0)], 320)
    text = "  The naïve façade\t漢字 🙂\r\n\n\x00 end <eos>  "
    (tokens,) = encode(tokenizer, [text])
    assert tokenizer.decode(tokens[:-1].tolist()) == text
    assert tokens[-1] == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.decode(tokens[:-1].tolist()) == text
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_training_a_tokenizer_twice_gives_the_same_one():
    documents = [prose(500, seed=seed) for seed in range(5)]
    first, second = (train_tokenizer(documents, 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_documents_of_any_length_are_encoded_in_order():
    tokenizer = train_tokenizer([prose(500, seed=0)], 320)
    documents = ["short", prose(400_000, seed=1), "", "word " * 300_000, "last"]
    assert min(len(documents[1]), len(documents[3])) > 1_000_000  # the most that is encoded at once
    encoded = list(encode(tokenizer, documents))
    assert [tokenizer.decode(tokens[:-1].tolist()) for tokens in encoded] == documents
    assert all(tokens[-1] == tokenizer.eos_token_id for tokens in encoded)


def test_a_tokenizer_folder_is_used_instead_of_training_one(text_config, tmp_path):
    tokenizer = train_tokenizer([prose(500, seed=0)], 333)
    tokenizer.backend_tokenizer.enable_truncation(8)  # as some published ones have it; would cut every document
    tokenizer.save_pretrained(tmp_path)
    config = TextData(**{**vars_of(text_config), "tokenizer": str(tmp_path)})
    data = load(config)
    assert len(data.tokenizer) == len(tokenizer)
    text = "<|eos|>".join(open_corpus(config).validation)
    assert text.startswith(decoded(data, data.validation))
    assert len(text) < len(decoded(data, data.validation)) + 200


def test_a_tokenizer_that_cannot_be_used_is_refused(text_config, tmp_path):
    for name in (str(tmp_path), "/no/such/folder"):
        with pytest.raises(ValueError, match=rf"data\.tokenizer='{name}'"):
            load(TextData(**{**vars_of(text_config), "tokenizer": name}))
    without_end = train_tokenizer([prose(100, seed=0)], 300)
    without_end.eos_token = None
    without_end.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no `eos_token`"):
        load(TextData(**{**vars_of(text_config), "tokenizer": str(tmp_path)}))
