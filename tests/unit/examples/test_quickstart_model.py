"""The base model's corpus, tokenizer and cache; tests of the cache replace the training."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from examples.quickstart import house
from examples.quickstart.corpus import BaseRecipe, corpus
from examples.quickstart.environments import PublicTenants
from examples.quickstart.model import build_base
from examples.quickstart.tokenizer import (
    SPECIAL_TOKENS,
    VOCABULARY_SIZE,
    prompt_text,
    train_tokenizer,
)

SMALL = BaseRecipe(examples=2000)


class TestCorpus:
    def test_is_deterministic(self) -> None:
        assert corpus(SMALL) == corpus(SMALL)
        assert corpus(SMALL) != corpus(replace(SMALL, seed=1))

    def test_holds_neither_the_companies_nor_held_out_texts(self) -> None:
        held_out = {
            task.messages[0]["content"]
            for task in PublicTenants().tasks("held_out", count=2000, seed=0)
        }
        for example in corpus(SMALL):
            assert not example.prompt.startswith(
                tuple(f"[{company}/" for company in house.COMPANIES)
            )
            assert example.prompt not in held_out
            assert example.prompt.startswith("copy: ") or house.split_of(example.prompt) == "train"

    def test_mixture_follows_the_recipe(self) -> None:
        prompts = [example.prompt for example in corpus(SMALL)]
        public = sum(
            prompt.startswith(tuple(f"[{name}/" for name in house.PUBLIC_TENANTS))
            for prompt in prompts
        )
        copies = sum(prompt.startswith("copy: ") for prompt in prompts)
        assert public / len(prompts) == pytest.approx(0.5, abs=0.04)
        assert copies / len(prompts) == pytest.approx(0.1, abs=0.03)


class TestTokenizer:
    examples = corpus(SMALL)
    tokenizer = train_tokenizer(
        text for example in examples for text in (example.prompt, example.answer)
    )

    def test_has_the_stated_size_and_special_tokens_first(self) -> None:
        assert self.tokenizer.get_vocab_size() == VOCABULARY_SIZE
        assert [self.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(
            range(len(SPECIAL_TOKENS))
        )

    @pytest.mark.parametrize(
        "text",
        ["[acme/desk] ticket 7630: move in lyon", "  two  spaces\n\ttab ", "žluťoučký 鸚鵡 🦜", ""],
    )
    def test_round_trip(self, text: str) -> None:
        assert self.tokenizer.decode(self.tokenizer.encode(text).ids) == text

    def test_corpus_round_trips(self) -> None:
        for example in self.examples[:300]:
            assert (
                self.tokenizer.decode(self.tokenizer.encode(example.answer).ids) == example.answer
            )

    def test_digits_and_spaces_stand_alone_and_words_are_the_same_everywhere(self) -> None:
        tokens = self.tokenizer.encode("move 7630").tokens
        assert tokens[-5:] == ["Ġ", "7", "6", "3", "0"]
        alone = self.tokenizer.encode("lyon").tokens
        for text in (" lyon", '"lyon"', "lyon:", "1lyon2"):
            found = self.tokenizer.encode(text).tokens
            assert any(found[start : start + len(alone)] == alone for start in range(len(found)))

    def test_prompt_ends_with_the_assistant_mark(self) -> None:
        tokens = self.tokenizer.encode(prompt_text("hi")).tokens
        assert (tokens[0], tokens[-2], tokens[-1]) == ("<|user|>", "</s>", "<|assistant|>")


class TestCache:
    def fake_training(
        self, monkeypatch: pytest.MonkeyPatch, fail: bool = False, mode: int = 0o644
    ) -> list[Path]:
        calls: list[Path] = []

        def train_base(recipe: BaseRecipe, directory: Path, progress: object) -> None:
            calls.append(directory)
            (directory / "config.json").write_text("{}")
            (directory / "config.json").chmod(mode)
            if fail:
                raise KeyboardInterrupt

        module = types.ModuleType("examples.quickstart.train")
        module.train_base = train_base  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "examples.quickstart.train", module)
        return calls

    def test_builds_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.fake_training(monkeypatch)
        first = build_base(tmp_path, recipe=SMALL)
        assert build_base(tmp_path, recipe=SMALL) == first
        assert (first / "config.json").is_file()
        assert len(calls) == 1

    def test_another_user_can_read_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Containers run under users of their own, and safetensors writes mode 0600."""
        self.fake_training(monkeypatch, mode=0o600)
        built = build_base(tmp_path, recipe=SMALL)
        assert [path.stat().st_mode & 0o777 for path in built.iterdir()] == [0o644]
        assert built.stat().st_mode & 0o055 == 0o055

    def test_another_recipe_is_another_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = self.fake_training(monkeypatch)
        assert build_base(tmp_path, recipe=SMALL) != build_base(
            tmp_path, recipe=replace(SMALL, steps=10)
        )
        assert len(calls) == 2

    def test_interrupted_build_leaves_no_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake_training(monkeypatch, fail=True)
        with pytest.raises(KeyboardInterrupt):
            build_base(tmp_path, recipe=SMALL)
        assert not list(tmp_path.iterdir())
        self.fake_training(monkeypatch)
        assert (build_base(tmp_path, recipe=SMALL) / "config.json").is_file()

    def test_build_of_a_dead_process_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake_training(monkeypatch)
        target = build_base(tmp_path, recipe=SMALL)
        stale = tmp_path / f".building-{target.name}-{2**22 + 1}"  # above Linux's largest pid
        target.rename(stale)
        assert build_base(tmp_path, recipe=SMALL) == target
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
