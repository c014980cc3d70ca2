"""What of a caption is trained on, and which are refused."""

import pytest

from core.errors import BadData
from core.vision.captions import IGNORED, collate_captions, wordless

BOS, EOS, PAD, UNKNOWN = 1, 2, 0, 3
SPECIAL = {BOS, EOS, PAD, UNKNOWN}


def test_the_prompt_and_padding_carry_no_loss_and_the_end_does() -> None:
    rows = collate_captions([[BOS, 7, 8, 9, EOS], [BOS, 7, 5, EOS]], prompt_tokens=2, pad=EOS, special=SPECIAL)
    assert rows.input_ids.tolist() == [[BOS, 7, 8, 9, EOS], [BOS, 7, 5, EOS, EOS]]
    assert rows.labels.tolist() == [[IGNORED, IGNORED, 8, 9, EOS], [IGNORED, IGNORED, 5, EOS, IGNORED]]
    assert rows.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 1, 0]]


def test_captions_of_special_tokens_alone_are_named() -> None:
    assert wordless([[BOS, EOS], [BOS, 9], [UNKNOWN], []], SPECIAL) == [1, 3, 4]
    captions = [[BOS, 7, 8, EOS], [BOS, 7, EOS], [BOS], [BOS, 7, UNKNOWN, EOS]]
    with pytest.raises(BadData, match="3 of 4 captions have no word, special tokens aside: number 2, 3, 4"):
        collate_captions(captions, prompt_tokens=2, pad=PAD, special=SPECIAL)
    with pytest.raises(BadData, match="number 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …"):
        collate_captions([[BOS, EOS]] * 11, prompt_tokens=1, pad=PAD, special=SPECIAL)
    with pytest.raises(BadData, match="no caption to train on"):
        collate_captions([], prompt_tokens=1, pad=PAD, special=SPECIAL)
