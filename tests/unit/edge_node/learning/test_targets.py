from __future__ import annotations

import pytest

from edge_node.errors import SettingsError
from edge_node.learning.targets import targeted

LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
GPT_NEOX = [
    f"gpt_neox.layers.0.{name}"
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h")
]
OPT = ["model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.0.fc1"]


@pytest.mark.parametrize(
    ("setting", "count"),
    [
        ("all-linear", 84),
        ("attention", 48),
        (["q_proj", "self_attn.v_proj"], 24),
        (["model.layers.1.mlp.up_proj"], 1),
        (["layers.1.mlp.up_proj", "1.mlp.up_proj"], 1),
        (r".*\.mlp\..*", 36),
        (r"model\.layers\.1\..*", 7),
        (".*", 84),
    ],
)
def test_modules_are_chosen_by_word_name_or_expression(
    setting: str | list[str], count: int
) -> None:
    found = targeted(setting, LLAMA)
    assert len(found) == count
    assert found == [module for module in LLAMA if module in found], "in the base's order"


def test_attention_is_found_in_other_families_too() -> None:
    assert targeted("attention", GPT_NEOX) == GPT_NEOX[:2]
    assert targeted("attention", OPT) == OPT[:1]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (["q_proj", "w_proj"], "names 'w_proj', which the base model does not have. Known names: "),
        (["proj"], "names 'proj'"),
        ("q_proj", "is 'q_proj', which fits none of the base model's 84 modules. A regular"),
        (r"layers\.1\..*", "such as model.layers.0.mlp.down_proj; names go into a JSON list."),
    ],
)
def test_what_fits_nothing_is_refused_with_the_known_names(
    setting: str | list[str], words: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        targeted(setting, LLAMA)
    assert words in str(caught.value)
    assert "self_attn.q_proj, self_attn.v_proj." in str(caught.value)


def test_a_base_without_attention_by_that_name_is_told() -> None:
    with pytest.raises(SettingsError, match=r"'attention', which fits none .*Known names: fc1\."):
        targeted("attention", OPT[1:])
