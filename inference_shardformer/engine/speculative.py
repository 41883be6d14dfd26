"""PromptLookup: drafts of a sequence's next tokens, taken from what followed the same tokens earlier in it.

Drafts are verified in the step that would have computed one token anyway: where few sequences decode, reading the
weights takes most of a step, and further tokens cost little. No second model. After Saxena, "Prompt Lookup Decoding"
(2023), and Yang et al., "Inference with Reference" (2023), with the longest match instead of a fixed length.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_LATEST = 8  # earlier places that are compared
_LONGEST = 32  # tokens in common, beyond which places count as equally good
_FIRST_DRAFT = 4
_LONGEST_DRAFT = 64
_LONGEST_PAUSE = 32


class PromptLookup:
    """Drafts for one sequence, whose growing list of tokens it keeps an index of; and how many of them pay.

    A draft that was right lets the next one be longer; one that was wrong from its first token on makes a pause. Pauses
    double with every draft that was wrong and halve with every other one, so a text that repeats little costs next to
    nothing. Depends on the tokens alone.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._places: dict[tuple[int, ...], array[int]] = {}  # of the tokens behind each pair
        self._num_indexed = 1
        self._length = _FIRST_DRAFT
        self._pause = 1
        self._rest = 0

    def propose(self, most: int) -> list[int]:
        """The likely next tokens, at most `most`; none where nothing like the last two tokens came before.

        Never more than are in common with the earlier place, which is what speaks for them.
        """
        self._index()
        if self._rest > 0:
            self._rest -= 1
            return []
        num_in_common, start = self._best_place() if most > 0 else (0, 0)
        return self._copied(start, min(most, self._length, num_in_common))

    def settle(self, num_drafted: int, num_accepted: int) -> None:
        """Take note of how a draft turned out."""
        if num_accepted == 0:
            self._length, self._rest = 1, self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            return
        self._pause = max(self._pause // 2, 1)
        self._length = min(2 * self._length, _LONGEST_DRAFT) if num_accepted == num_drafted else num_accepted + 1

    def _index(self) -> None:
        tokens = self._token_ids
        for place in range(self._num_indexed + 1, len(tokens)):  # what is behind the last pair comes next
            self._places.setdefault((tokens[place - 2], tokens[place - 1]), array("q")).append(place)
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)

    def _best_place(self) -> tuple[int, int]:
        """How many tokens the best of the latest places behind a pair like the last has in common; where it is."""
        places = self._places.get(tuple(self._token_ids[-2:]), ())
        return max(((self._num_in_common(place), place) for place in places[-_LATEST:]), default=(0, 0))

    def _num_in_common(self, place: int) -> int:
        """Tokens before `place` that also end the sequence."""
        tokens, end = self._token_ids, len(self._token_ids)
        longest = min(place, _LONGEST)
        return next((n for n in range(longest) if tokens[place - 1 - n] != tokens[end - 1 - n]), longest)

    def _copied(self, start: int, num_tokens: int) -> list[int]:
        """What stands from `start` on; beyond the end it goes round, as a text that repeats itself would."""
        tokens, end = self._token_ids, len(self._token_ids)
        return [tokens[start + i % (end - start)] for i in range(num_tokens)]


def num_accepted(drafts: Sequence[int], token_ids: Sequence[int]) -> int:
    """How many leading drafts are the tokens that were chosen at their places."""
    pairs = zip(drafts, token_ids[: len(drafts)], strict=True)
    return next((i for i, (draft, chosen) in enumerate(pairs) if draft != chosen), len(drafts))
