"""Sources: texts that are read whole, with soft prompts and text prompts in them."""

from __future__ import annotations

from collections.abc import Callable

from promptd_store import PromptKind

from promptd.modeling.families.base import Arrangement, Asked, Source
from promptd.modeling.packed_batch import Virtual


def arrange_source(
    asked: Asked, encode: Callable[[str], list[int]], first_ids: frozenset[int], *, is_kept: bool
) -> Arrangement:
    """Put soft prompts and texts in front of the text, left to right; prefixes are cached.

    Where the first prompt stands behind the beginning-of-text token, all do, if the text has one (of `first_ids`).
    """
    ids: list[int] = []
    virtual: list[Virtual] = []
    front = [prompt for prompt in asked.prompts if prompt.kind is not PromptKind.PREFIX]
    own = list(asked.token_ids)
    if front and front[0].manifest.prompt_after_bos and own and own[0] in first_ids:
        ids.append(own.pop(0))
    for prompt in front:
        if prompt.kind is PromptKind.TEXT:
            ids += encode(prompt.manifest.text or "")
        else:
            embeds = prompt.tensors["prompt_embeddings"]
            virtual.append(Virtual(len(ids), embeds))
            ids += [0] * embeds.shape[0]
    return Arrangement(
        cached=tuple(prompt for prompt in asked.prompts if prompt.kind is PromptKind.PREFIX),
        num_public=sum(prompt.kind is PromptKind.PREFIX for prompt in asked.prompts[: asked.num_public]),
        source=Source(tuple(ids + own), tuple(virtual), is_kept),
    )
