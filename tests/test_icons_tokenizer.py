"""The tokenizer that is learnt from the texts of the data set: the same each time, and it reads what it writes."""

from mome.icons.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ["house tree", "tree house boat", "red house", "red boat anchor"] * 20


def test_equal_texts_give_equal_ids():
    first, second = (train_tokenizer(TEXTS, 60, 16).get_vocab() for _ in range(2))
    assert first == second
    assert sorted(first.values()) == list(range(len(first)))
    assert [first[token] for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


def test_words_of_the_texts_are_pieces_and_others_fall_into_some():
    tokenizer = train_tokenizer(TEXTS, 60, 16)
    known, unknown = tokenizer(["Red house", "hoarse"]).input_ids
    assert tokenizer.convert_ids_to_tokens(known) == ["[BOS]", "red", "house", "[EOS]"]
    assert tokenizer.unk_token_id not in unknown and len(unknown) > 3
    assert tokenizer.decode(known, skip_special_tokens=True) == "red house"
    assert tokenizer("<image>").input_ids == [tokenizer.bos_token_id, 3, tokenizer.eos_token_id]
