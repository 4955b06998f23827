"""A chat: a problem as the token ids of a prompt, as the chat template of a model writes it."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

from transformers import PreTrainedTokenizerFast

from sampling import Problem, Task

CANDIDATES = 32  # problems that are encoded to find the longest prompt, for each of two signs of length


@dataclass
class Chat:
    """How a model with this tokenizer is asked the problems of a task."""

    tokenizer: PreTrainedTokenizerFast
    task: Task

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's token ids, up to where the assistant speaks. ValueError where the chat template or the tokenizer
        would leave out rules or numbers. A tokenizer that can't spell the rules (the embedded policy's) is asked
        without them: its model knows them."""
        *system, user = (message["content"] for message in self.task.prompt(problem))
        rules = "\n\n".join(system)
        if not self.can_spell(user):
            raise ValueError(f"its tokenizer has no tokens for {user!r}")
        text = self.write(rules if self.can_spell(rules) else "", user)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def can_spell(self, text: str) -> bool:
        """Whether the tokenizer has tokens for a text."""
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def write(self, rules: str, user: str) -> str:
        """The prompt in the first form that the chat template writes in full: the rules as system text or, for models
        without it, before the user text; as text, or as parts."""
        apart, together = [("system", rules), ("user", user)], [("user", f"{rules}\n\n{user}")]
        failure: Exception = ValueError("its chat template leaves out the rules or the problem")
        for turns, in_parts in product((apart, together) if rules else ([("user", user)],), (False, True)):
            messages = [{"role": role, "content": content(text, in_parts)} for role, text in turns]
            try:
                written = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template's own
                failure = error
                continue
            if rules in written and user in written:
                return written
        raise failure

    def stop_ids(self, stops: int | list[int] | None) -> set[int]:
        """The tokens that end an answer: the tokenizer's, the chat template's, and `stops`, those of a model."""
        stops = stops if isinstance(stops, list) else [stops]
        return {self.tokenizer.eos_token_id, self.turn_end(), *stops} - {None}

    def turn_end(self) -> int | None:
        """The special token that the chat template writes after an answer. None if it writes none."""
        for in_parts in (False, True):
            messages = [{"role": role, "content": content(role, in_parts)} for role in ("user", "assistant")]
            with suppress(Exception):  # a template's own
                written = self.tokenizer.apply_chat_template(messages, tokenize=False)
                _, answer, after = written.rpartition("assistant")
                first = self.tokenizer(after.strip(), add_special_tokens=False)["input_ids"][:1]
                if answer and first and first[0] in self.tokenizer.added_tokens_decoder:
                    return first[0]
        return None

    def longest(self, problems: Sequence[Problem]) -> int:
        """Tokens of the longest prompt. To encode all prompts would take seconds: those with the most characters and
        those with the most words are encoded."""
        texts = {problem: self.task.prompt(problem)[-1]["content"] for problem in problems}
        by_length = sorted(texts, key=lambda problem: -len(texts[problem]))
        by_words = sorted(by_length, key=lambda problem: -len(texts[problem].split()))
        return max(len(self.encode(problem)) for problem in [*by_length[:CANDIDATES], *by_words[:CANDIDATES]])


def content(text: str, in_parts: bool) -> str | list[dict[str, str]]:
    """A message's content, as text or as parts."""
    return [{"type": "text", "text": text}] if in_parts else text
