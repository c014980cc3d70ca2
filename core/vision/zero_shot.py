"""Zero-shot classes: a picture belongs to the one whose name, put into sentences, lies nearest (arXiv 2103.00020, 3.1)."""

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

PLAIN_PROMPTS = ("a photo of a {}.",)


def class_sentences(names: Sequence[str], prompts: Sequence[str] = PLAIN_PROMPTS) -> list[str]:
    """Each name in each prompt, class after class. Raises ValueError for names that differ in nothing, or a prompt without {}."""
    wrong = [f"the prompt {prompt!r} has no place for a name: {{}} is missing" for prompt in prompts if "{}" not in prompt]
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name.strip():
            wrong.append(f"class {number} has no name")
        elif name.strip() in seen:
            wrong.append(f"class {number} has the name {name!r}, which another has too")
        seen.add(name.strip())
    if wrong or not names or not prompts:
        raise ValueError("; ".join(wrong) or "at least one class name and one prompt are needed")
    return [prompt.replace("{}", name.strip()) for name in names for prompt in prompts]


def class_features(sentences: torch.Tensor, classes: int) -> torch.Tensor:
    """Unit fp32 [C, D]: the mean direction of each class's sentences, unit features [C * P, D] in `class_sentences`' order."""
    return normalize(sentences.float().reshape(classes, -1, sentences.shape[-1]).mean(1), dim=-1)


@torch.no_grad()
def zero_shot_accuracy(
    images: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor, *, at: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Share of pictures whose class is among the K nearest, by K. Unit features [N, D] and [C, D], labels int64 [N].

    A class that is as near as the right one stands before it. Raises ValueError for labels that are no class.
    """
    if not len(labels) or len(labels) != len(images) or not bool(((labels >= 0) & (labels < len(classes))).all()):
        raise ValueError(f"{len(images)} pictures need as many labels, each from 0 to {len(classes) - 1}")
    near = images.float() @ classes.float().T
    own = near.gather(1, labels[:, None])
    ahead = (near >= own).sum(1) - 1
    return {k: float((ahead < k).float().mean()) for k in at}
