"""Captions as a text tower reads them: start, words, end.

The end token is where the tower's feature is taken, so a cut leaves it in place (`write_token_cache`'s `kept_end`).
"""

from core.data.render import Rendered
from core.data.tokenizer import Tokenizer
from core.errors import BadSpec, InvalidInput


def check_caption_tokens(tokenizer: Tokenizer, name: str) -> None:
    """Raises BadSpec for a tokenizer that has no tokens to put a caption between."""
    if tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise BadSpec(f"{name}: its tokenizer names no bos_token or no eos_token, and captions stand between the two")


def render_caption(text: str, tokenizer: Tokenizer) -> Rendered:
    """Ids, and 1 for each that is of the text. Marks of special tokens in a text are text.

    Raises InvalidInput for a text of which nothing is left but special tokens: it would be learned as what fits any picture.
    """
    assert tokenizer.bos_id is not None, "check_caption_tokens comes first"
    ids, _ = tokenizer.encode(text.strip(), parse_special=False)
    special = {*tokenizer.special.values(), tokenizer.bos_id, *tokenizer.eos_ids}
    if all(token in special for token in ids):
        raise InvalidInput(f"the caption {text[:40]!r} has no word that the tokenizer knows")
    return Rendered([tokenizer.bos_id, *ids, tokenizer.eos_ids[0]], [0, *(int(token not in special) for token in ids), 0])
