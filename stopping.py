"""Stop strings: where they end what is sampled, and the response that is left without them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data import Response
    from prepare import Run


class StopStrings:
    """Finds the first stop string in the text of sampled tokens; `stop_at` of `generate`.

    A stop string may begin and end inside tokens. The end depends on the tokens alone, not on how
    many are new at a call. strings: at least one, see check_stops.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]):
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A decoder may drop the space at the beginning of a window of tokens.
        self.reach = max(map(len, self.strings)) + 4
        self.candidates: dict[int, bool] = {}   # whether a token may complete a stop string

    def __call__(self, tokens: list[int], seen: int) -> int | None:
        """How many of the tokens there are when a stop string is complete, or None.

        The first `seen` of them are known to hold none.
        """
        for end in range(seen + 1, len(tokens) + 1):
            token = tokens[end - 1]
            if token not in self.candidates:
                self.candidates[token] = self._may_complete(token)
            if self.candidates[token] and self._complete(tokens, end):
                return end
        return None

    def before(self, text: str) -> str:
        """The part of the text before the first stop string; all of it if there is none."""
        return text[:min((text.index(each) for each in self.strings if each in text),
                         default=len(text))]

    def _may_complete(self, token: int) -> bool:
        text, last = decode(self.tokenizer, [token]), {each[-1] for each in self.strings}
        # Alone, a token may lack a space at its beginning, or be part of a character.
        return " " in last or not text or "\ufffd" in text or not last.isdisjoint(text)

    def _complete(self, tokens, end):
        """Whether tokens[:end] have a stop string in their text; one token less has none.

        It decodes the last tokens and, only where these have one, all of them.
        """
        start, text = end, ""
        # U+FFFD shows that the window begins inside a character.
        while start and (len(text) < self.reach or "\ufffd" in text):
            start = max(0, start - self.reach)
            text = decode(self.tokenizer, tokens[start:end - 1]).rstrip("\ufffd")
        return all(self.before(text) != text for text in (
            decode(self.tokenizer, tokens[begin:end]) for begin in (start, 0)))


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens. Special tokens stay, because <answer> may be one."""
    return tokenizer.decode(tokens, skip_special_tokens=False)


def check_stops(tokenizer: Any, strings: Sequence[str]) -> None:
    """Raises ValueError for a stop string that is empty or can never be in a response."""
    for each in strings:
        reason, made = "", {decode(tokenizer, tokenizer.encode(before + each))
                            for before in ("", "1", "a ")} if each else set()
        if not each:
            reason = "is empty: every response would end at once"
        elif "\ufffd" in each:
            reason = "has the sign U+FFFD, which stands for characters that are not complete"
        elif tokenizer.eos_token and tokenizer.eos_token in each:
            reason = f"has {tokenizer.eos_token}, which ends every response by itself: leave it out"
        elif not any(each in text for text in made):
            reason = f"can never be in a response: the tokenizer makes {min(made)!r} of it"
        if reason:
            raise ValueError(f"--stop {each!r} {reason}")


def end_response(response: "Response", run: "Run") -> "Response":
    """Gives a response its text, and takes a stop string that ended it out of its tokens, in place.

    response.tokens are those sampled. Those that hold text before the stop string stay, and the
    first token always does. An off-policy response then ends with the end-of-text token, as one to
    the plain question does, unless it has max_new_tokens already. Returns the response.
    """
    r, builder, stop_ids, tokenizer = (response, run.builder, run.model.stop_ids,
                                       run.builder.tokenizer)
    r.text = builder.response_text(r.tokens, stop_ids, builder.stop_at[r.off_policy])
    kept, r.sampled = len(r.tokens), r.tokens
    if r.finished and r.sampled[-1] not in stop_ids:
        while kept > 1 and decode(tokenizer, r.sampled[:kept - 1]).startswith(r.text):
            kept -= 1
        r.tokens = r.sampled[:kept]
        if r.off_policy and kept < run.options.max_new_tokens:
            end = tokenizer.eos_token_id
            r.tokens.append(stop_ids[0] if end is None else end)
        r.old_logprobs = fold(r.old_logprobs, r)
    return r


def fold(logprobs: list[float], response: "Response") -> list[float]:
    """The log-probabilities of response.tokens, from those of response.sampled.

    An end-of-text token in the place of a stop string has the sum of those of the tokens for which
    it stands: the log-probability with which the behaviour policy ended the response there.
    """
    count = len(response.tokens)
    replaced = response.off_policy and response.tokens != response.sampled
    return logprobs[:count - replaced] + [sum(logprobs[count - 1:])] * replaced
